"""The arms of the study: which router each run trains with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One row of a table."""

    label: str
    """As tables and plots name it."""
    block: dict[str, Any]
    """The `"ssr"` block of the DeepSpeed configuration, without seed and monitor. In a schedule, steps are given
    as shares of the run."""
    auxiliary_loss: float = 0.0
    """What the training loss weighs the gate's `l_aux` with."""

    def block_for(self, steps: int) -> dict[str, Any]:
        """The block for a run of that many steps."""
        block = copy.deepcopy(self.block)
        schedule = block.get("probability")
        if isinstance(schedule, dict):
            for key in ("warmup_steps", "decay_steps"):
                if key in schedule:
                    schedule[key] = round(schedule[key] * steps)
        return block


# The schedule of configs/deepspeed/cpu.json.
_SLOW = {"warmup": 1.0, "warmup_steps": 0.3, "decay_steps": 0.4, "final": 0.05}
_SHORT = {"warmup": 1.0, "warmup_steps": 0.2, "decay_steps": 0.1, "final": 0.01}
_CAPACITY_BEFORE = {"polytope": "capacity", "refresh": "before"}
_CAPACITY_AFTER = {"polytope": "capacity", "refresh": "after"}
_MASS_BEFORE = {"polytope": "mass", "refresh": "before"}

ARMS: dict[str, Arm] = {
    "topk_gate": Arm("TopKGate, auxiliary loss 0.01", {"enabled": False}, auxiliary_loss=0.01),
    "none": Arm("none", {"rule": "none"}),
    "auxiliary": Arm("auxiliary loss 0.01", {"rule": "auxiliary"}, auxiliary_loss=0.01),
    "quantile": Arm("Quantile Balancing", {"rule": "quantile"}),
    "s_base": Arm("S-BASE", {"rule": "s_base", "entropy": 1.0}),
    "loss_free": Arm("loss-free bias", {"rule": "loss_free"}),
    "z": Arm("z-loss 0.001", {"rule": "z"}, auxiliary_loss=0.001),
    "noisy": Arm("noisy top-k", {"rule": "noisy"}),
    "ssr_paper": Arm('SSR, preset "paper"', {"preset": "paper"}),
    "ssr_rare": Arm("SSR, p = 0.01", {"rule": "ssr", "probability": 0.01, "entropy": 1.0, "gradient": "partial"}),
    "ssr_warmup": Arm(
        "SSR, warm-up, implicit gradient",
        {"rule": "ssr", "probability": _SLOW, "entropy": 1.0, "gradient": "implicit"},
    ),
    "ssr_trigger": Arm(
        "SSR, triggered above 0.3, implicit gradient",
        {"rule": "ssr", "probability": {"imbalance": 0.3}, "entropy": 1.0, "gradient": "implicit"},
    ),
    "ssr_full": Arm(
        "SSR at every step, implicit gradient",
        {"rule": "ssr", "probability": 1.0, "entropy": 1.0, "gradient": "implicit"},
    ),
    "capacity_warmup": Arm("k-capacity, warm-up", {"rule": "capacity", "probability": _SLOW, "entropy": 0.3}),
    "carried": Arm(
        "carried, k-capacity, refreshed before",
        {"rule": "carried", "probability": 0.01, "entropy": 0.3, "carried": _CAPACITY_BEFORE},
    ),
    "carried_after": Arm(
        "carried, k-capacity, refreshed after",
        {"rule": "carried", "probability": 0.0, "entropy": 0.3, "carried": _CAPACITY_AFTER},
    ),
    "carried_warmup": Arm(
        "carried, k-capacity, refreshed after, warm-up",
        {"rule": "carried", "probability": _SHORT, "entropy": 0.3, "carried": _CAPACITY_AFTER},
    ),
    "carried_mass": Arm(
        "carried, row mass 1, refreshed before",
        {"rule": "carried", "probability": 0.0, "entropy": 1.0, "carried": _MASS_BEFORE},
    ),
}

BEST = ("auxiliary", "quantile", "ssr_warmup", "carried")
"""The arms of the further tables: the strongest rivals and ours."""
