"""The install seam: `DeepSpeedEngine`, through which every DeepSpeed user passes.

DeepSpeed has no plugin mechanism, and users reach the engine in many ways (`deepspeed.initialize`,
HF Trainer, accelerate, PipelineEngine, Megatron-DeepSpeed), some of which bind functions before we
are imported. All of them construct a `DeepSpeedEngine`, so five of its methods are wrapped:

    __init__           afterwards, the engine's "ssr" block is read and its gates are swapped
    forward            beforehand, the coin is tossed if `global_steps` has changed
    _take_model_step   beforehand, the logits are checked; afterwards, the rules commit what they have
                       observed, and the load monitor closes the step
    save_checkpoint    beforehand, a check of the logits still on its way is read; the rules' state goes along
    load_checkpoint    afterwards, such a check is dropped, and the rules take their state over

The step counter is read here and not in a gate, where it would make torch.compile recompile at
every step. An engine whose configuration has no "ssr" block is left alone. `uninstall` restores
the methods and every gate that was swapped.

Tested with deepspeed 0.16.9, 0.19.3 and 0.19.8.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from ssr_deepspeed.collectives import gather_objects, maximum_over
from ssr_deepspeed.config import SSRConfig, find_block
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.hosts import deepspeed_moe
from ssr_deepspeed.hosts.finite import FiniteWatch
from ssr_deepspeed.hosts.rules import KEY, RuleStates
from ssr_deepspeed.monitor import LoadMonitor, layer_metrics
from ssr_deepspeed.monitor.sinks import JsonLines, engine_events

_originals: dict[str, Callable[..., Any]] = {}
_runtimes: weakref.WeakSet[EngineRuntime] = weakref.WeakSet()


class EngineRuntime:
    """SSR of one engine, found at `engine.ssr`: its gates, its coin, its monitor.

    Args:
        engine: an engine whose construction is finished.
        config: its `"ssr"` block.
        gates: this rank's gates by name, all of them replaceable.
        layers: number of experts of every gate of the whole model.
        sink: gets the load reports; None on all ranks but the first.
        unused_keys: keys of the block that play no part under its rule.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        config: SSRConfig,
        gates: dict[str, TopKGate],
        layers: dict[str, int],
        sink: JsonLines | None,
        unused_keys: list[str],
    ) -> None:
        self.config, self.gates, self._sink, self.unused_keys = config, gates, sink, unused_keys
        self.layers = sorted(layers, key=_natural)
        self.step = engine.global_steps
        self.report: dict[str, Any] | None = None
        """The last load report, as written to the JSON lines; the same on every rank."""
        self._hooks: list[Any] = []
        self._finite: FiniteWatch | None = None
        self._rules: RuleStates | None = None
        self._scale = 1.0
        if self.config.enabled:
            group = _same_gates(engine)
            adopted = {
                name: SSRGate.adopt(gate, self.config, self.layers.index(name), group)
                for name, gate in self.gates.items()
            }
            self._rules = RuleStates(self.config, adopted, self.layers, group, engine.device)
            if not _scales_loss(engine):
                by_layer = {gate.ssr.layer: gate for gate in adopted.values()}
                self._finite = FiniteWatch(by_layer, self.layers, engine.device)
        self.monitor = self._attach_monitor(engine, layers) if self.config.monitor.interval else None
        self._set_step(self.step)

    def _attach_monitor(self, engine: DeepSpeedEngine, layers: dict[str, int]) -> LoadMonitor:
        monitor = LoadMonitor(
            self.layers,
            [layers[name] for name in self.layers],
            self.config.monitor.interval,
            engine.device,
            copies=bwc_tensor_model_parallel_world_size(groups.mpu),
        )
        for name, gate in self.gates.items():
            self._hooks.append(deepspeed_moe.count_routes(gate, monitor, self.layers.index(name)))
        return monitor

    def _set_step(self, step: int) -> None:
        self.step = step
        for gate in self.gates.values():
            if isinstance(gate, SSRGate):
                gate.set_step(step)

    def before_forward(self, engine: DeepSpeedEngine) -> None:
        """Toss the coin if the engine is at another step than at the last pass."""
        if engine.global_steps != self.step:
            self._set_step(engine.global_steps)

    def before_step(self, engine: DeepSpeedEngine) -> None:
        """Stop, on all ranks, where router logits were not finite."""
        if self._finite:
            self._finite.before_step(engine.global_steps)
        self._scale = _loss_scale(engine)

    def before_save(self) -> dict[str, Any]:
        """What a checkpoint is to hold beside the module's state.

        Stops, on all ranks, rather than save what logits that were not finite have spoilt.
        """
        if self._finite:
            self._finite.settle()
        return self._rules.save() if self._rules else {}

    def after_load(self, saved: dict[str, Any] | None, rank: int) -> None:
        """Forget the passes before the checkpoint's weights came, and take over the rules' state."""
        if self._finite:
            self._finite.forget()
        sentence = self._rules.load(saved) if self._rules else None
        if sentence and rank == 0:
            _say(sentence)

    def after_step(self, engine: DeepSpeedEngine) -> None:
        """Commit the rules' state, toss the next step's coin, close this step; at the monitor's interval, report."""
        if self._rules:
            skipped = _skipped_by_torch(engine, self._scale)
            self._rules.after_step(engine.was_step_applied() and not skipped, self._scale)
        self._set_step(engine.global_steps)
        window = self.monitor.end_step(engine.global_steps - 1) if self.monitor else None
        if window is None:
            return
        layers = layer_metrics(window)
        self.report = {"kind": "load", "step": engine.global_steps, "steps": window.steps, "layers": layers}
        if self._sink:
            self._sink.write(self.report)
        if engine.monitor.enabled:
            engine.monitor.write_events(engine_events(layers, engine.global_samples))

    def release(self) -> None:
        """Give the model its own gates back and stop counting."""
        for gate in self.gates.values():
            if isinstance(gate, SSRGate):
                gate.release()
        for hook in self._hooks:
            hook.remove()
        if self._sink:
            self._sink.close()
        self.monitor, self._finite, self._rules = None, None, None


def install() -> None:
    """Make every DeepSpeed engine built from now on obey its `"ssr"` block. Repeated calls do nothing.

    Raises:
        RuntimeError: this DeepSpeed lacks a method that SSR hangs on to.
    """
    if _originals:
        return
    wrappers = {
        "__init__": _wrap_init,
        "forward": _wrap_forward,
        "_take_model_step": _wrap_take_model_step,
        "save_checkpoint": _wrap_save_checkpoint,
        "load_checkpoint": _wrap_load_checkpoint,
    }
    for name in wrappers:
        if name not in vars(DeepSpeedEngine):
            raise RuntimeError(
                f"deepspeed {deepspeed.__version__} has no deepspeed.runtime.engine.DeepSpeedEngine.{name}; "
                "SSR was tested with 0.16.9, 0.19.3 and 0.19.8: install one of them"
            )
    for name, wrap in wrappers.items():
        _originals[name] = vars(DeepSpeedEngine)[name]
        setattr(DeepSpeedEngine, name, wrap(_originals[name]))


def uninstall() -> None:
    """Undo `install`: DeepSpeed's methods, and the gates of every engine still alive.

    Raises:
        RuntimeError: another plugin has wrapped the same method since; nothing is undone.
    """
    for name, original in _originals.items():
        ours = vars(DeepSpeedEngine)[name]
        if getattr(ours, "__wrapped__", None) is not original:
            raise RuntimeError(
                f"DeepSpeedEngine.{name} was wrapped again after SSR was installed: undo that first, then uninstall SSR"
            )
    for name, original in _originals.items():
        setattr(DeepSpeedEngine, name, original)
    _originals.clear()
    for runtime in list(_runtimes):
        runtime.release()
    _runtimes.clear()


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize` with SSR installed: same arguments, same results.

    Raises:
        ValueError: the configuration has no `"ssr"` block.
    """
    install()
    engine, *rest = deepspeed.initialize(*args, **kwargs)
    if not isinstance(vars(engine).get("ssr"), EngineRuntime):
        raise ValueError('the DeepSpeed configuration has no "ssr" block; add one, "ssr": {} for the defaults')
    return (engine, *rest)


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        runtime = _agree(self)
        if runtime is not None:
            self.ssr = runtime
            _runtimes.add(runtime)
        if self.global_rank == 0:
            _announce(runtime)

    return __init__


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        runtime = vars(self).get("ssr")
        if runtime is not None:
            runtime.before_forward(self)
        return original(self, *args, **kwargs)

    return forward


def _wrap_take_model_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _take_model_step(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        runtime = vars(self).get("ssr")
        if runtime is not None:
            runtime.before_step(self)
        result = original(self, *args, **kwargs)
        if runtime is not None:
            runtime.after_step(self)
        return result

    return _take_model_step


def _wrap_save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(
        self: DeepSpeedEngine, save_dir: str, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        runtime = vars(self).get("ssr")
        client_state = {} if client_state is None else client_state
        if runtime is not None:
            client_state = {**client_state, KEY: runtime.before_save()}
        return original(self, save_dir, tag, client_state, *args, **kwargs)

    return save_checkpoint


def _wrap_load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        path, client_state = original(self, *args, **kwargs)
        runtime = vars(self).get("ssr")
        if runtime is not None and path is not None:
            runtime.after_load(client_state.pop(KEY, None) if client_state else None, self.global_rank)
        return path, client_state

    return load_checkpoint


def _same_gates(engine: DeepSpeedEngine) -> Any:
    """The ranks that hold the same gates and see other tokens: data-parallel ones, and sequence-parallel peers."""
    if getattr(engine, "mesh_device", None) is not None:
        # A mesh of just these two kinds of ranks: the engine's own group has only the first.
        return dist.group.WORLD
    group = getattr(engine, "seq_data_parallel_group", None)
    return engine.data_parallel_group if group is None else group


def _torch_scaler(engine: DeepSpeedEngine) -> Any:
    """torch's own loss scaler, which DeepSpeed uses for fp16 by autocast under ZeRO 0."""
    return getattr(engine, "torch_autocast_z0_gradscaler", None)


def _skipped_by_torch(engine: DeepSpeedEngine, scale: float) -> bool:
    """Whether torch's own scaler skipped the step that began with this scale, on any rank."""
    if _torch_scaler(engine) is None:
        return False
    # It tells the engine nothing, but lets its scale fall; and each rank's judges its own experts' gradients alone.
    fell = torch.tensor(int(_loss_scale(engine) < scale), device=engine.device)
    return bool(maximum_over(dist.group.WORLD, fell))


def _loss_scale(engine: DeepSpeedEngine) -> float:
    """What the gradients of this step are multiplied by; 1 without a loss scaler."""
    if not _scales_loss(engine):
        return 1.0
    scaler = _torch_scaler(engine)
    if scaler is not None:
        return float(scaler.get_scale())
    optimizer: Any = engine.optimizer
    return float(optimizer.loss_scale if hasattr(optimizer, "loss_scale") else getattr(optimizer, "cur_scale", 1.0))


def _scales_loss(engine: DeepSpeedEngine) -> bool:
    """Whether a loss scaler expects overflows and skips their step: fp16, plain or (since 0.17) by autocast."""
    if engine.fp16_enabled():
        return True
    autocast = getattr(engine, "torch_autocast_enabled", None)
    return autocast is not None and autocast() and engine.torch_autocast_dtype() == torch.float16


def _agree(engine: DeepSpeedEngine) -> EngineRuntime | None:
    """Switch SSR on for an engine, once all ranks have said with one collective that they can.

    Every rank takes part, with a block or without, so that ranks with different files meet here
    and not as a hang in the first step.

    Raises:
        ValueError: on every rank alike, when on any rank the block is wrong or no gate can be
            replaced. The model is then unchanged.
    """
    config, sink, problem, block = None, None, None, None
    gates = deepspeed_moe.find_gates(engine.module)
    try:
        block = find_block(engine._config._param_dict)
        if block is not None:
            config = SSRConfig.from_dict(block)
            problem = _refusals(gates) if config.enabled else None
            if config.monitor.interval and config.monitor.path and engine.global_rank == 0:
                sink = JsonLines(config.monitor.path)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"cannot write ssr.monitor.path: {error}"
    layers = {name: gate.wg.weight.shape[0] for name, gate in gates.items() if hasattr(gate, "wg")}
    look_alikes = [] if block is None else _look_alikes(engine.module)
    ranks = gather_objects({"problem": problem, "block": block, "layers": layers, "look_alikes": look_alikes})
    try:
        _check_ranks(ranks)
    except ValueError:
        if sink:
            sink.close()
        raise
    if config is None:
        return None
    layers = {name: experts for theirs in ranks for name, experts in theirs["layers"].items()}
    return EngineRuntime(engine, config, gates, layers, sink, config.unused_keys(block or {}))


def _refusals(gates: dict[str, TopKGate]) -> str | None:
    reasons = {name: SSRGate.refusal(gate) for name, gate in gates.items()}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason) or None


def _check_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank, theirs in enumerate(ranks):
        if theirs["problem"]:
            raise ValueError(f"SSR, rank {rank}: {theirs['problem']}")
        if theirs["block"] != ranks[0]["block"]:
            raise ValueError(f'the "ssr" block of rank {rank} differs from that of rank 0: give all ranks one file')
    if ranks[0]["block"] is not None and not any(theirs["layers"] for theirs in ranks):
        found = sorted({name for theirs in ranks for name in theirs["look_alikes"]})
        raise ValueError(
            'the DeepSpeed configuration has an "ssr" block, but no rank has a router that SSR replaces '
            f"(TopKGate of deepspeed.moe.layer.MoE); modules that look like one: {found or 'none'}"
        )


def _look_alikes(model: nn.Module) -> list[str]:
    kinds = {type(module).__qualname__ for module in model.modules()}
    return sorted(kind for kind in kinds if re.search(r"moe|expert|router|gate|switch", kind, re.IGNORECASE))


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _announce(runtime: EngineRuntime | None) -> None:
    """Say once what SSR does to an engine."""
    if runtime is None:
        lines = ['is installed, but this engine\'s configuration has no "ssr" block: its routers stay as they are']
    elif runtime.config.enabled:
        lines = [f"active on {len(runtime.layers)} routers: {', '.join(runtime.layers)}"]
        lines += [f"TopKGate's {option} plays no part" for option in deepspeed_moe.unused_options(runtime.gates)]
        lines += [f'"{key}" plays no part under rule "{runtime.config.rule}"' for key in runtime.unused_keys]
    else:
        lines = [f"disabled by its block; counting the load of {len(runtime.layers)} routers"]
    for line in lines:
        _say(line)


def _say(sentence: str) -> None:
    """One line on stderr. DeepSpeed's logger hides all but warnings."""
    print(f"SSR {sentence}", file=sys.stderr, flush=True)
