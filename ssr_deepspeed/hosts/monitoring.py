"""Expert-load monitoring of one engine: hooks on its routers, a report at the interval, and where reports go."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from ssr_deepspeed.config import MonitorConfig
from ssr_deepspeed.hosts.finite import NonfiniteLogitsError
from ssr_deepspeed.hosts.routers import Found
from ssr_deepspeed.monitor import LoadMonitor, LoadWindow, layer_metrics, model_metrics
from ssr_deepspeed.monitor.alerts import Alerts, nonfinite_record, sentence
from ssr_deepspeed.monitor.sinks import JsonLines, engine_events, load_records, read_kinds
from ssr_deepspeed.token_router import Padding


class EngineMonitor:
    """Counts the routes of an engine's routers and reports them.

    Args:
        config: the `"monitor"` section.
        engine: an engine whose construction is finished.
        found: this rank's routers by name.
        names: of all routers of the whole model, in order.
        experts: number of experts of each.
        padding: which tokens are padding, where hosts do not tell.
        sink: gets the records; None on all ranks but the first.
    """

    def __init__(
        self,
        config: MonitorConfig,
        engine: DeepSpeedEngine,
        found: dict[str, Found],
        names: list[str],
        experts: list[int],
        padding: Padding,
        sink: JsonLines | None,
    ) -> None:
        self._engine_monitor, self._sink = engine.monitor, sink
        self._samples = 0
        self._report: dict[str, Any] | None = None
        self.counts = LoadMonitor(
            names,
            experts,
            config.interval,
            engine.device,
            copies=bwc_tensor_model_parallel_world_size(groups.mpu),
            micro_batches=getattr(engine, "micro_batches", engine.gradient_accumulation_steps()),
        )
        self._hooks = []
        for name, router in found.items():
            layer = names.index(name)
            self._hooks.append(router.count(self.counts, layer, padding))
            self.counts.place(layer, _ranks_of_experts(engine.module, name))
        self._config, self._alerts = config, Alerts(config.alerts)
        if sink is not None:
            self._alerts.take(read_kinds(sink.path, ("alert",)))

    @property
    def report(self) -> dict[str, Any] | None:
        """The last load report, the same on every rank; see `monitor.metrics`."""
        self.settle()
        return self._report

    def end_step(self, engine: DeepSpeedEngine) -> None:
        """Close an optimizer step; report the window that has ended."""
        self.settle()
        self._samples = engine.global_samples
        window = self.counts.end_step(engine.global_steps - 1)
        if window is not None:
            self._write(window)

    def settle(self) -> None:
        """Report a window that is still on its way from the device."""
        window = self.counts.settle()
        if window is not None:
            self._write(window)

    def before_save(self, step: int) -> dict[str, Any]:
        """What a checkpoint is to hold: the counts of the window that has begun. Every rank calls it."""
        self.settle()
        return {"step": step, "counts": self.counts.save()}

    def after_load(self, saved: dict[str, Any] | None, step: int) -> None:
        """Go on where the checkpoint was: with its window's counts, without what was written after it."""
        self.settle()
        if saved is None or saved["step"] != step:  # its weights alone were loaded
            self.counts.load(None)
            return
        self.counts.load(saved["counts"])
        if self._sink:
            self._sink.forget_after(step, ("load", "experts", "alert"))
            self._alerts = Alerts(self._config.alerts)
            self._alerts.take(read_kinds(self._sink.path, ("alert",)))

    def stopped(self, error: NonfiniteLogitsError) -> None:
        """Record what stops the run; it says so itself."""
        self.settle()
        if self._sink:
            self._sink.write(nonfinite_record(error.layer, error.step))

    def release(self) -> None:
        """Stop counting."""
        self.settle()
        for hook in self._hooks:
            hook.remove()

    def _write(self, window: LoadWindow) -> None:
        layers = layer_metrics(window)
        self._report = {
            "kind": "load",
            "step": window.first_step + window.steps,
            "steps": window.steps,
            "time": round(time.time(), 3),
            "model": model_metrics(layers),
            "layers": layers,
        }
        alerts = self._alerts.judge(self._report)
        if self._sink:
            for record in [*load_records(self._report), *alerts]:
                self._sink.write(record)
        if not _is_first():
            return
        for alert in alerts:
            say(sentence(alert))
        if self._engine_monitor.enabled:
            self._engine_monitor.write_events(engine_events(self._report, self._samples))


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _ranks_of_experts(model: nn.Module, name: str) -> list[int]:
    """The ranks that share the experts of a router, in the order of the experts they hold; empty for one alone."""
    router, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    # TopKGate knows its group; of AutoEP's router, the layer it is in.
    group = getattr(router, "ep_group", None) or getattr(block, "ep_group", None)
    return [] if group is None else dist.get_process_group_ranks(group)


def say(sentence: str) -> None:
    """One line on stderr. DeepSpeed's logger hides all but warnings."""
    print(f"SSR {sentence}", file=sys.stderr, flush=True)
