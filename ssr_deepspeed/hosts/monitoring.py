"""Expert-load monitoring of one engine: hooks on its routers, a report at the interval, and where reports go."""

from __future__ import annotations

import atexit
import sys
import time
import weakref
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

from ssr_deepspeed.config import MonitorConfig
from ssr_deepspeed.hosts.finite import NonfiniteLogitsError
from ssr_deepspeed.hosts.routers import Found
from ssr_deepspeed.monitor import LoadMonitor, LoadWindow, layer_metrics, model_metrics
from ssr_deepspeed.monitor.alerts import Alerts, nonfinite_record, sentence
from ssr_deepspeed.monitor.sinks import JsonLines, engine_events, load_records, read_kinds
from ssr_deepspeed.token_router import Padding

_alive: weakref.WeakSet[EngineMonitor] = weakref.WeakSet()
"""At the end of the process their last windows may still be on their way."""


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
        self._is_first = engine.global_rank == 0  # asked at the end of the process too, when there is no group
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
            if router.experts_group is not None:
                self.counts.place(layer, dist.get_process_group_ranks(router.experts_group))
        self._alerts = Alerts(config.alerts)
        # Whether nothing was written since the start or a checkpoint, and at whose step that was; None: at none that
        # this run's records go on from.
        self._is_fresh = True
        self._resumed_at: int | None = None
        self._fails = False
        """Whether the last try to write failed."""
        _alive.add(self)

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
        return {"step": step, "counts": self.counts.save(), "dead": self._alerts.streaks}

    def after_load(self, saved: dict[str, Any] | None, step: int) -> None:
        """Go on where the checkpoint was: with its window's counts, without what was written after it."""
        self.settle()
        resumes = step > 0 and (saved is None or saved["step"] == step)
        saved = saved if resumes else None
        self.counts.load(saved and saved["counts"])
        self._alerts.resume(saved["dead"] if saved else {})
        # Where weights alone were loaded, the file is that of another run, and stays.
        self._report, self._is_fresh, self._resumed_at = None, True, step if resumes else None

    def stopped(self, error: NonfiniteLogitsError) -> None:
        """Record what stops the run; it says so itself."""
        self.settle()
        self._catch_up(error.step)
        self._record([nonfinite_record(error.layer, error.step)])

    def release(self) -> None:
        """Stop counting."""
        self.settle()
        _alive.discard(self)
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
        self._catch_up(self._report["step"])
        alerts = self._alerts.judge(self._report)
        self._record([*load_records(self._report), *alerts])
        if not self._is_first:
            return
        for alert in alerts:
            say(sentence(alert))
        if self._engine_monitor.enabled:
            self._engine_monitor.write_events(engine_events(self._report, self._samples))

    def _catch_up(self, step: int) -> None:
        """Before the first record since the start or a checkpoint: make the file, and the alerts, those of its step.

        Not before: whoever loads a checkpoint to look at it writes nothing, and must lose nothing.
        """
        if not self._is_fresh or self._sink is None:
            return
        try:
            if self._resumed_at is not None:
                self._sink.forget_after(self._resumed_at, ("load", "experts", "alert"))
            earlier = read_kinds(self._sink.path, ("alert",))
            self._alerts.take(record for record in earlier if record["step"] < step)
            self._is_fresh = False
        except OSError as error:
            self._failed(error)

    def _record(self, records: list[dict[str, Any]]) -> None:
        if self._sink is None or self._is_fresh:  # which it still is where the file could not be made ready
            return
        try:
            self._sink.write(*records)
        except OSError as error:
            self._failed(error)
            return
        if self._fails:
            say("writes load records again")
        self._fails = False

    def _failed(self, error: OSError) -> None:
        """Say so once; training goes on, also for the ranks that would wait for this one."""
        if not self._fails:
            say(f"WARNING: cannot write load records: {error}; make room at ssr.monitor.path. Training goes on")
        self._fails = True


@atexit.register
def _settle_all() -> None:
    for monitor in list(_alive):
        monitor.settle()


def say(sentence: str) -> None:
    """One line on stderr. DeepSpeed's logger hides all but warnings."""
    print(f"SSR {sentence}", file=sys.stderr, flush=True)
