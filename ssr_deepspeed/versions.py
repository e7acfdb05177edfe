"""Which versions of DeepSpeed SSR works with, and what it needs of them: the one place that says so.

`ssr_deepspeed.hosts` checks it before anything else imports DeepSpeed's parts, so that an unfit version is named
with what it lacks.
"""

from __future__ import annotations

import importlib

from packaging.version import Version

LOWEST = "0.15"
"""In older ones the MoE layer calls its gate in other ways."""
TESTED = ("0.15.4", "0.16.9", "0.17.6", "0.19.3", "0.19.8")

SYMBOLS = {
    "deepspeed.accelerator": ["get_accelerator"],
    "deepspeed.moe.sharded_moe": ["TOPK_GATE_TIMER", "TopKGate"],
    "deepspeed.runtime.engine": ["DeepSpeedEngine"],
    "deepspeed.utils": ["groups"],
    "deepspeed.utils.bwc": ["bwc_tensor_model_parallel_group", "bwc_tensor_model_parallel_world_size"],
}
"""What is imported of DeepSpeed, by module."""


def tested() -> str:
    """The tested versions, for messages."""
    return f"{', '.join(TESTED[:-1])} and {TESTED[-1]}"


def check_host(version: str) -> None:
    """Refuse a DeepSpeed that SSR cannot work with.

    Raises:
        RuntimeError: it is too old.
        ImportError: it lacks a symbol, which is named by its full path.
    """
    if Version(version).release < Version(LOWEST).release:
        raise RuntimeError(
            f"deepspeed {version} is too old for ssr_deepspeed: install deepspeed>={LOWEST} (tested with {tested()})"
        )
    for module, names in SYMBOLS.items():
        for name in names:
            try:
                found = hasattr(importlib.import_module(module), name)
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("deepspeed"):
                    raise
                found = False
            if not found:
                raise ImportError(
                    f"deepspeed {version} has no {module}.{name}: ssr_deepspeed was tested with {tested()}; "
                    "install one of them"
                )


def beyond_tested(version: str) -> str | None:
    """A sentence where DeepSpeed is newer than all that was tested, else None."""
    if Version(version).release <= Version(TESTED[-1]).release:
        return None
    return (
        f"was tested with deepspeed {TESTED[0]} to {TESTED[-1]}, and this is {version}: it goes on; where something "
        f"fails, try deepspeed=={TESTED[-1]}"
    )
