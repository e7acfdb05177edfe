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
the methods and every gate that was swapped. Another engine over a model that has had one, as a second
`Trainer.train` builds it, goes on with what the rules have kept.

Tested with the versions of DeepSpeed in `ssr_deepspeed/versions.py`.
"""

from __future__ import annotations

import functools
import os
import re
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ssr_deepspeed.collectives import gather_objects
from ssr_deepspeed.config import SSRConfig, find_block
from ssr_deepspeed.hosts import deepspeed_moe
from ssr_deepspeed.hosts.monitoring import say
from ssr_deepspeed.hosts.routers import Found, find_routers
from ssr_deepspeed.hosts.rules import KEY
from ssr_deepspeed.hosts.runtime import EngineRuntime
from ssr_deepspeed.monitor.sinks import JsonLines
from ssr_deepspeed.router import RouterState
from ssr_deepspeed.versions import beyond_tested, tested

_originals: dict[str, Callable[..., Any]] = {}
_runtimes: weakref.WeakKeyDictionary[nn.Module, EngineRuntime] = weakref.WeakKeyDictionary()
"""By model, which may outlive its engine and get another."""


def install() -> bool:
    """Make every DeepSpeed engine built from now on obey its `"ssr"` block. Repeated calls do nothing.

    Returns:
        Whether this call did it.

    Raises:
        RuntimeError: this DeepSpeed lacks a method that SSR hangs on to.
    """
    if _originals:
        return False
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
                f"deepspeed {deepspeed.__version__} has no deepspeed.runtime.engine.DeepSpeedEngine.{name}: "
                f"ssr_deepspeed was tested with {tested()}; install one of them"
            )
    for name, wrap in wrappers.items():
        present = vars(DeepSpeedEngine)[name]
        # What the environment variable has put there is done by this call.
        _originals[name] = getattr(present, "ssr_replaces", present)
        setattr(DeepSpeedEngine, name, wrap(_originals[name]))
    newer = beyond_tested(deepspeed.__version__)
    if newer and os.environ.get("RANK", "0") == "0":
        say(newer)
    return True


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
    for runtime in list(_runtimes.values()):
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
        equip(self)

    return __init__


def equip(engine: DeepSpeedEngine) -> None:
    """Have an engine whose construction is finished obey its `"ssr"` block; every rank calls it.

    Raises:
        ValueError: on every rank alike; see `_agree`.
    """
    runtime = _agree(engine)
    if runtime is not None:
        engine.ssr = runtime
        _runtimes[engine.module] = runtime
    if engine.global_rank == 0:
        _announce(runtime)


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
            client_state = {**client_state, KEY: runtime.before_save(self)}
        return original(self, save_dir, tag, client_state, *args, **kwargs)

    return save_checkpoint


def _wrap_load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        path, client_state = original(self, *args, **kwargs)
        runtime = vars(self).get("ssr")
        if runtime is not None and path is not None:
            runtime.after_load(self, client_state.pop(KEY, None) if client_state else None)
        return path, client_state

    return load_checkpoint


def _agree(engine: DeepSpeedEngine) -> EngineRuntime | None:
    """Switch SSR on for an engine, once all ranks have said with one collective that they can.

    Every rank takes part, with a block or without, so that ranks with different files meet here
    and not as a hang in the first step.

    Raises:
        ValueError: on every rank alike, when on any rank the block is wrong or no gate can be
            replaced. The model is then unchanged.
    """
    config, sink, problem, block = None, None, None, None
    earlier = _release_earlier(engine.module)
    gates: dict[str, Found] = {}
    notes: list[str] = []
    try:
        block = find_block(engine._config._param_dict)
        if block is not None:
            config = SSRConfig.from_dict(block)
            gates, left_alone = find_routers(engine.module)
            problem = _refusals(gates, config) if config.enabled else None
            notes = _notes(engine.module, config, block, gates, left_alone)
            if config.monitor.interval and config.monitor.path and engine.global_rank == 0:
                sink = JsonLines(config.monitor.path)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"cannot write ssr.monitor.path: {error}"
    layers = {name: gate.experts for name, gate in gates.items()}
    look_alikes = [] if block is None else [*_look_alikes(engine.module), *notes]
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
    return EngineRuntime(engine, config, gates, layers, sink, notes, earlier)


def _release_earlier(model: nn.Module) -> dict[nn.Module, RouterState]:
    """Take a model's routers back from the engine that it had before; their states."""
    modules = set(model.modules())
    states: dict[nn.Module, RouterState] = {}
    for owner, runtime in list(_runtimes.items()):
        if not modules.isdisjoint(runtime.gates.values()):
            states.update({router: router.ssr for router in runtime.routers()})
            runtime.release()
            del _runtimes[owner]
    return states


def _notes(
    model: nn.Module, config: SSRConfig, block: dict[str, Any], gates: dict[str, Found], left_alone: dict[str, str]
) -> list[str]:
    """What the user has asked for that will not be done, or that works beside SSR, as sentences."""
    notes = [f"leaves {name} alone ({reason})" for name, reason in left_alone.items()]
    options = deepspeed_moe.unused_options(gate.module for gate in gates.values())
    notes += [f"TopKGate's {option} plays no part" for option in options]
    notes += [f'"{key}" plays no part under rule "{config.rule}"' for key in config.unused_keys(block)]
    settings = getattr(model, "config", None)
    weight = getattr(settings, "router_aux_loss_coef", 0)
    if isinstance(weight, int | float) and weight > 0:
        returned = bool(getattr(settings, "output_router_logits", False))
        added = "adds" if returned else "would add, with output_router_logits=True,"
        notes.append(f"leaves the model's own auxiliary loss as it is: it {added} {weight} times that to its loss")
    return notes


def _refusals(gates: dict[str, Found], config: SSRConfig) -> str | None:
    reasons = {name: gate.refusal(config) for name, gate in gates.items()}
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
            "(TopKGate of deepspeed.moe.layer.MoE, or one that returns weights and indices, as AutoEP's and those of "
            f"transformers); modules that look like one: {found or 'none'}"
        )


def _look_alikes(model: nn.Module) -> list[str]:
    kinds = {type(module).__qualname__ for module in model.modules()}
    return sorted(kind for kind in kinds if re.search(r"moe|expert|router|gate|switch", kind, re.IGNORECASE))


def _announce(runtime: EngineRuntime | None) -> None:
    """Say once what SSR does to an engine."""
    if runtime is None:
        lines = ['is installed, but this engine\'s configuration has no "ssr" block: its routers stay as they are']
    elif runtime.config.enabled:
        lines = [f"active on {len(runtime.layers)} routers: {', '.join(runtime.layers)}"]
        lines += runtime.notes
    else:
        lines = [f"disabled by its block; counting the load of {len(runtime.layers)} routers"]
    for line in lines:
        say(line)
