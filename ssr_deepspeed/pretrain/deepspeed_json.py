"""Checks of the `"deepspeed"` section that DeepSpeed itself leaves out, or makes when the ranks have already met.

DeepSpeed ignores top-level keys that it does not know, and misspelt keys of its optimizer and scheduler sections.
What it knows is found by watching its own reader, so that no list here grows old.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import (
    ADAM_OPTIMIZER,
    ADAM_W_MODE,
    ADAMW_OPTIMIZER,
    DEEPSPEED_OPTIMIZERS,
    TORCH_ADAM_PARAM,
    DeepSpeedConfig,
)
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel, ValidationError

from ssr_deepspeed.section import nearest

# Asked for only where the process group is there already, and this plugin's own.
_OTHERS = {"sequence_parallel_size", "ssr"}
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Read by name, key after key; the other sections are models of their own, which refuse what they do not know.
_BY_NAME = ("activation_checkpointing", "checkpoint", "data_types", "flops_profiler", "optimizer", "scheduler")
# Of these it reads the parameters only where there is a type.
_COMPLETE: dict[str, dict] = {
    "optimizer": {"type": "AdamW", "params": {}},
    "scheduler": {"type": "WarmupLR", "params": {}},
}


def check_deepspeed(section: dict[str, Any]) -> None:
    """Find what DeepSpeed would ignore or refuse, before there is a process group.

    Raises:
        ValueError: an unknown key, with its path and the nearest known one; a value that DeepSpeed refuses; an
            optimizer, a schedule or a ZeRO stage that cannot be used here.
    """
    if not any(key in section for key in _BATCHES[:2]):
        raise ValueError(f"deepspeed lacks a batch size; add {_BATCHES[0]!r} or {_BATCHES[1]!r}")
    for key in _BATCHES:
        if key in section and (type(section[key]) is not int or section[key] < 1):
            raise ValueError(f"deepspeed.{key} = {section[key]!r}; allowed: whole numbers from 1")
    asked = _read(section)
    for key in section:
        if key not in asked:
            raise ValueError(
                f"unknown key deepspeed.{key} = {section[key]!r}{nearest(key, sorted(asked))}; DeepSpeed knows no such "
                "key and would ignore it"
            )
    for name in _BY_NAME:
        for key in section.get(name, {}):
            if key not in asked[name]:
                known = sorted(asked[name])
                raise ValueError(
                    f"unknown key deepspeed.{name}.{key} = {section[name][key]!r}{nearest(key, known)}; allowed "
                    f"keys: {known}"
                )
    stage = section.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise ValueError(f"deepspeed.zero_optimization.stage = {stage!r}; allowed: 0, 1, 2, for DeepSpeed's MoE layer")
    if "optimizer" not in section:
        raise ValueError("deepspeed lacks an optimizer; add one, such as {'type': 'AdamW', 'params': {'lr': 1e-3}}")
    for name, parameters_of in (("optimizer", _optimizer_parameters), ("scheduler", _schedule_parameters)):
        if name in section:
            _check_parameters(section, name, parameters_of)


def check_batch(section: dict[str, Any], ranks: int) -> None:
    """Check that the batch sizes fit the number of ranks.

    Raises:
        ValueError: they do not.
    """
    total, micro, steps = (section.get(key) for key in _BATCHES)
    if total is None:
        return
    share = ranks * (micro or 1) * (steps or 1)
    if total % share or (micro and steps and total != share):
        factors = " times ".join(
            [f"{ranks} ranks", *(f"{key} = {section[key]}" for key in _BATCHES[1:] if section.get(key))]
        )
        kind = "is not" if micro and steps else "is no multiple of"
        raise ValueError(f"deepspeed.train_batch_size = {total} {kind} {factors} = {share}: set it to such a number")


class _Watched(dict):
    """A section that notes which keys its reader asks for."""

    def __init__(self, values: dict[str, Any], asked: dict[str, dict]) -> None:
        super().__init__(values)
        self.asked = asked

    def _note(self, key: str) -> Any:
        below = self.asked.setdefault(key, {})
        value = super().get(key)
        return _Watched(value, below) if key in _BY_NAME and isinstance(value, dict) else value

    def get(self, key: str, default: Any = None) -> Any:
        value = self._note(key)
        return value if super().__contains__(key) else default

    def __getitem__(self, key: str) -> Any:
        value = self._note(key)
        return value if super().__contains__(key) else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        # Asked as `key in section.keys()` in places.
        return self

    def __copy__(self) -> _Watched:
        return self


def _read(section: dict[str, Any]) -> dict[str, dict]:
    """The keys that DeepSpeed asks for when it reads the section, and within the sections of `_BY_NAME`.

    Raises:
        ValueError: it refuses the section.
    """
    # The batch sizes are checked against the number of ranks where that is known.
    rest = {key: value for key, value in section.items() if key not in _BATCHES}
    asked: dict[str, dict] = {key: {} for key in _OTHERS}
    try:
        whole = {name: {**least, **rest.get(name, {})} for name, least in _COMPLETE.items()}
        DeepSpeedConfig(_Watched({_BATCHES[1]: 1, **rest, **whole}, asked))
    except Exception as problem:
        for key, value in rest.items():
            try:
                DeepSpeedConfig({_BATCHES[1]: 1, key: value})
            except Exception as error:
                raise ValueError(_sentence(f"deepspeed.{key}", error)) from None
        raise ValueError(_sentence("deepspeed", problem)) from None
    return asked


def _sentence(path: str, error: Exception) -> str:
    """What is wrong with a section, by the error with which DeepSpeed refused it."""
    if not isinstance(error, ValidationError):
        return f"{path}: {error}"
    first = error.errors()[0]
    # Some models hold the section under its own name.
    place = first["loc"][1:] if path.endswith(f".{first['loc'][0]}") else first["loc"]
    where = ".".join(map(str, (path, *place)))
    if first["type"] != "extra_forbidden":
        return f"{where} = {first['input']!r}: {first['msg']}"
    known = _fields(error.title, first["loc"][:-1])
    return f"unknown key {where} = {first['input']!r}{nearest(first['loc'][-1], known)}; allowed keys: {known}"


def _fields(title: str, path: tuple[int | str, ...]) -> list[str]:
    """Keys of the configuration model of that name, or of the one at that path within it."""
    model: Any = next((found for found in _below(DeepSpeedConfigModel) if found.__name__ == title), None)
    for name in path:
        field = model.model_fields.get(str(name)) if model else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return sorted(field.alias or name for name, field in model.model_fields.items()) if model else []


def _below(model: Any) -> Iterator[Any]:
    for direct in model.__subclasses__():
        yield direct
        yield from _below(direct)


def _optimizer_parameters(kind: str) -> list[str] | None:
    """What an optimizer takes; None where it is not asked: those that DeepSpeed compiles."""
    if kind.lower() in (ADAM_OPTIMIZER, ADAMW_OPTIMIZER):
        torch_s, deepspeed_s = _arguments(torch.optim.AdamW), _arguments(FusedAdam)
        return sorted({*torch_s, *deepspeed_s, TORCH_ADAM_PARAM, ADAM_W_MODE})
    if kind.lower() in DEEPSPEED_OPTIMIZERS:
        return None
    found = getattr(torch.optim, kind, None)
    if not inspect.isclass(found):
        known = sorted(DEEPSPEED_OPTIMIZERS)
        near = nearest(kind.lower(), known)
        raise ValueError(f"deepspeed.optimizer.type = {kind!r}; allowed: {known} and torch's{near}")
    return _arguments(found)


def _schedule_parameters(kind: str) -> list[str] | None:
    found = getattr(lr_schedules, kind, None) or getattr(torch.optim.lr_scheduler, kind, None)
    if not inspect.isclass(found):
        known = lr_schedules.VALID_LR_SCHEDULES
        raise ValueError(f"deepspeed.scheduler.type = {kind!r}; allowed: {known} and torch's{nearest(kind, known)}")
    return _arguments(found)


def _arguments(kind: Any) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name not in ("params", "optimizer")]


def _check_parameters(section: dict[str, Any], name: str, parameters_of: Callable[[str], list[str] | None]) -> None:
    if not isinstance(section[name].get("type"), str):
        raise ValueError(f"deepspeed.{name} = {section[name]!r} lacks a type: DeepSpeed would ignore it")
    known = parameters_of(section[name]["type"])
    for key, value in section[name].get("params", {}).items():
        if known is not None and key not in known:
            raise ValueError(
                f"unknown key deepspeed.{name}.params.{key} = {value!r}{nearest(key, known)}; allowed keys: {known}"
            )
