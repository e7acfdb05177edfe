"""What a device could do, and how long a run's gates keep it busy."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

# Dense 16-bit operations a second by the makers' data sheets, without sparsity; bf16, of V100 fp16.
_PEAKS = {
    "A10": 125e12,
    "A100": 312e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "L4": 121e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "V100": 125e12,
}


def peak_flops() -> float | None:
    """Dense 16-bit floating-point operations a second of this process's device; None where it is not known."""
    if get_accelerator().device_name() != "cuda":  # also AMD's
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device: str) -> float | None:
    """The same of a device by its name, such as `"NVIDIA A100-SXM4-80GB"`."""
    words = re.split(r"[\s-]+", device)
    if "MIG" in words:  # a part of the device
        return None
    known = [name for name in _PEAKS if set(name.split()) <= set(words)]
    return _PEAKS[max(known, key=len)] if known else None


class GateTimer:
    """Time spent in the forward passes of gates, measured only between `start` and `stop`.

    Args:
        gates: the modules to time.
    """

    def __init__(self, gates: Sequence[nn.Module]) -> None:
        self._gates = list(gates)
        self._hooks: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None
        self._entered: Any = None

    def start(self) -> None:
        """Begin to time every pass, also recomputed ones."""
        self._spans, self._began = [], _mark()
        for gate in self._gates:
            self._hooks.append(gate.register_forward_pre_hook(self._enter))
            self._hooks.append(gate.register_forward_hook(self._leave))

    def stop(self) -> float | None:
        """End it and wait for the device: the gates' share of the time since `start`; None if nothing was timed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._began is None or not self._spans:
            return None
        whole = _seconds_between(self._began, _mark())
        self._began = None
        return sum(_seconds_between(*span) for span in self._spans) / whole

    def _enter(self, *_: Any) -> None:
        self._entered = _mark()

    def _leave(self, *_: Any) -> None:
        # A recomputed pass may end within a gate, when all that is needed is there.
        self._spans.append((self._entered, _mark()))


def _mark() -> Any:
    """This moment: on the host, or on the device's stream where it works by itself."""
    accelerator = get_accelerator()
    if accelerator.use_host_timers():
        return time.perf_counter()
    event = accelerator.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000
