"""The arms of the study: which router each run trains with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One row of a table."""

    label: str
    """As tables and plots name it."""
    block: dict[str, Any]
    """The `"ssr"` block of the DeepSpeed configuration, without its monitor."""
    auxiliary_loss: float = 0.0
    """What the training loss weighs the gate's `l_aux` with."""


ARMS: dict[str, Arm] = {
    "topk_gate": Arm("TopKGate, auxiliary loss 0.01", {"enabled": False}, auxiliary_loss=0.01),
    "none": Arm("no balancing", {"probability": 0.0}),
    "ssr": Arm("SSR, p = 0.01", {"probability": 0.01}),
}

BEST = ("topk_gate", "none", "ssr")
"""Arms that the smaller tables compare."""
