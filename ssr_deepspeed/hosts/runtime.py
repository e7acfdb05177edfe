"""SSR of one engine: its routers, the coin, the rules' state, the monitor, at the pace of its optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_world_size
from torch import nn

from ssr_deepspeed.collectives import host_groups
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.hosts.finite import FiniteWatch, NonfiniteLogitsError
from ssr_deepspeed.hosts.monitoring import EngineMonitor, say
from ssr_deepspeed.hosts.routers import Found
from ssr_deepspeed.hosts.rules import RuleStates
from ssr_deepspeed.hosts.scaler import loss_scale, scales_loss, skipped_by_torch
from ssr_deepspeed.monitor.sinks import JsonLines
from ssr_deepspeed.router import LocalHook, Router, RouterState
from ssr_deepspeed.token_router import Padding


class EngineRuntime:
    """SSR of one engine, found at `engine.ssr`: its gates, its coin, its monitor.

    Args:
        engine: an engine whose construction is finished.
        config: its `"ssr"` block.
        gates: this rank's gates by name, all of them replaceable.
        layers: number of experts of every gate of the whole model.
        sink: gets the load reports; None on all ranks but the first.
        notes: sentences about what SSR does not do here.
        earlier: states of the same routers under an engine before this one; a rule of the same kind goes on with them.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        config: SSRConfig,
        gates: dict[str, Found],
        layers: dict[str, int],
        sink: JsonLines | None,
        notes: list[str],
        earlier: dict[nn.Module, RouterState],
    ) -> None:
        self.config, self._found, self._sink, self.notes = config, gates, sink, notes
        self.gates = {name: gate.module for name, gate in gates.items()}
        self.layers = sorted(layers, key=_natural)
        self.step = engine.global_steps
        self._hooks: list[Any] = []
        self._padding = Padding()
        if any(gate.contract is not None for gate in gates.values()):
            self._hooks.append(engine.module.register_forward_pre_hook(LocalHook(self._padding.read), with_kwargs=True))
        self._finite: FiniteWatch | None = None
        self._rules: RuleStates | None = None
        self._scale = 1.0
        if self.config.enabled:
            group = _same_gates(engine)
            adopted = {
                name: gate.adopt(self.config, self.layers.index(name), group, self._padding)
                for name, gate in self._found.items()
            }
            _introduce_peers(adopted, engine)
            self._rules = RuleStates(self.config, adopted, self.layers, group, _same_tokens(), engine.device)
            self._rules.inherit(earlier)
            if not scales_loss(engine):
                by_layer = {gate.ssr.layer: gate for gate in adopted.values()}
                self._finite = FiniteWatch(by_layer, self.layers, engine.device)
        self._monitor: EngineMonitor | None = None
        if self.config.monitor.interval:
            experts = [layers[name] for name in self.layers]
            self._monitor = EngineMonitor(
                self.config.monitor, engine, self._found, self.layers, experts, self._padding, sink
            )
        self._set_step(self.step)

    @property
    def report(self) -> dict[str, Any] | None:
        """The last load report, the same on every rank; None before the first."""
        return self._monitor.report if self._monitor else None

    def routers(self) -> list[Router]:
        """This rank's routers that are SSR's."""
        return [gate for gate in self.gates.values() if isinstance(gate, Router)]

    def _set_step(self, step: int) -> None:
        self.step = step
        for router in self.routers():
            router.set_step(step)

    def before_forward(self, engine: DeepSpeedEngine) -> None:
        """Toss the coin if the engine is at another step than at the last pass."""
        if engine.global_steps != self.step:
            self._set_step(engine.global_steps)

    def before_step(self, engine: DeepSpeedEngine) -> None:
        """Stop, on all ranks, where router logits were not finite."""
        with self._told():
            if self._finite:
                self._finite.before_step(engine.global_steps)
        self._scale = loss_scale(engine)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What stops the run stands in its records too."""
        try:
            yield
        except NonfiniteLogitsError as error:
            if self._monitor:
                self._monitor.stopped(error)
            raise

    def before_save(self, engine: DeepSpeedEngine) -> dict[str, Any]:
        """What a checkpoint is to hold beside the module's state.

        Stops, on all ranks, rather than save what logits that were not finite have spoilt.
        """
        with self._told():
            if self._finite:
                self._finite.settle()
        saved = self._rules.save() if self._rules else {}
        return saved | {"monitor": self._monitor.before_save(engine.global_steps)} if self._monitor else saved

    def after_load(self, engine: DeepSpeedEngine, saved: dict[str, Any] | None) -> None:
        """Forget the passes before the checkpoint's weights came, and take over the rules' state."""
        if self._finite:
            self._finite.forget()
        if self._monitor:
            self._monitor.after_load((saved or {}).pop("monitor", None), engine.global_steps)
        sentence = self._rules.load(saved) if self._rules else None
        if sentence and engine.global_rank == 0:
            say(sentence)
        self._set_step(engine.global_steps)

    def after_step(self, engine: DeepSpeedEngine) -> None:
        """Commit the rules' state, toss the next step's coin, close this step; at the monitor's interval, report."""
        skipped = skipped_by_torch(engine, self._scale)
        if skipped and engine.was_step_applied():  # as the engine believes
            engine.skipped_steps += 1
        if self._rules:
            self._rules.after_step(engine.was_step_applied() and not skipped, self._scale)
        self._set_step(engine.global_steps)
        if self._monitor:
            self._monitor.end_step(engine)

    def release(self) -> None:
        """Give the model its own gates back and stop counting."""
        if self._monitor:
            self._monitor.release()
        for router in self.routers():
            router.release()
        for hook in self._hooks:
            hook.remove()
        if self._sink:
            self._sink.close()
        self._monitor, self._finite, self._rules = None, None, None


def _same_gates(engine: DeepSpeedEngine) -> Any:
    """The ranks that hold the same gates and see other tokens: data-parallel ones, and sequence-parallel peers."""
    if getattr(engine, "mesh_device", None) is not None:
        # A mesh of just these two kinds of ranks: the engine's own group has only the first.
        return dist.group.WORLD
    group = getattr(engine, "seq_data_parallel_group", None)
    return engine.data_parallel_group if group is None else group


def _same_tokens() -> Any:
    """The tensor-parallel peers, which hold the same gates and see the same tokens; None where there are none."""
    return bwc_tensor_model_parallel_group(groups.mpu) if bwc_tensor_model_parallel_world_size(groups.mpu) > 1 else None


def _introduce_peers(gates: dict[str, Router], engine: DeepSpeedEngine) -> None:
    """Tell the first gate of each kind whom it exchanges buffers with.

    It asks for all that come after it in the same pass and make the same capacity of the same tokens. On an
    accelerator hosts need groups of their own to talk.
    """
    firsts: dict[tuple[Any, ...], SSRGate] = {}
    for gate in sorted(gates.values(), key=lambda gate: gate.ssr.layer):
        if isinstance(gate, SSRGate) and gate.drop_tokens:
            capacity = (gate.k, gate.capacity_factor, gate.eval_capacity_factor, gate.min_capacity)
            firsts.setdefault((gate.ep_group, gate.router_sizes[0], *capacity), gate)
    shared = [gate.ep_group for gate in firsts.values()]
    for gate, peers in zip(firsts.values(), host_groups(shared, engine.device), strict=True):
        gate.ssr.peers = peers


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
