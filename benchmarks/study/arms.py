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


# 30 % of the run by transport, then ever less of it.
_SLOW = {"warmup": 1.0, "warmup_steps": 0.3, "decay_steps": 0.4, "final": 0.05}
_SHORT = {"warmup": 1.0, "warmup_steps": 0.2, "decay_steps": 0.1, "final": 0.01}
_CAPACITY_BEFORE = {"polytope": "capacity", "refresh": "before"}
_CAPACITY_AFTER = {"polytope": "capacity", "refresh": "after"}
_MASS_BEFORE = {"polytope": "mass", "refresh": "before"}
_CARRIED = {
    "rule": "carried",
    "probability": 0.01,
    "weights": "shifted",
    "gradient": "centred",
    "carried": _CAPACITY_BEFORE,
}

ARMS: dict[str, Arm] = {
    "topk_gate": Arm("TopKGate, auxiliary loss 0.01", {"enabled": False}, auxiliary_loss=0.01),
    "none": Arm("no balancing", {"rule": "none"}),
    "auxiliary": Arm("auxiliary loss 0.01", {"rule": "auxiliary"}, auxiliary_loss=0.01),
    "global_auxiliary": Arm("global auxiliary loss 0.01", {"rule": "global_auxiliary"}, auxiliary_loss=0.01),
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
    "carried": Arm("carried (the default)", {**_CARRIED, "entropy": 0.1}),
    "carried_wide": Arm("carried, xi 0.3", {**_CARRIED, "entropy": 0.3}),
    "carried_softmax": Arm(
        "carried, xi 0.3, the softmax weighs",
        {"rule": "carried", "probability": 0.01, "entropy": 0.3, "weights": "softmax", "carried": _CAPACITY_BEFORE},
    ),
    "carried_after": Arm(
        "carried, xi 0.3, refreshed after, the softmax weighs",
        {"rule": "carried", "probability": 0.0, "entropy": 0.3, "weights": "softmax", "carried": _CAPACITY_AFTER},
    ),
    "carried_warmup": Arm(
        "carried, xi 0.3, refreshed after, warm-up, the softmax weighs",
        {"rule": "carried", "probability": _SHORT, "entropy": 0.3, "weights": "softmax", "carried": _CAPACITY_AFTER},
    ),
    "carried_mass": Arm(
        "carried, row mass 1, xi 1, the softmax weighs",
        {"rule": "carried", "probability": 0.0, "entropy": 1.0, "weights": "softmax", "carried": _MASS_BEFORE},
    ),
}

BEST = ("auxiliary", "quantile", "ssr_warmup", "carried")
"""The arms of the further tables: the strongest rivals and ours."""

COMPARED = tuple(name for name in ARMS if name != "global_auxiliary")
"""The arms of the main tables. In one micro-batch of one rank the global auxiliary loss is the plain one."""

QUICK = ("none", *BEST)
"""What the quick tables rerun."""

MICRO = ("auxiliary", "global_auxiliary", "carried")
"""What several micro-batches a step may change."""


def _carried(label: str, refresh: str = "before", polytope: str = "capacity", **changes: Any) -> Arm:
    block = {"rule": "carried", "probability": 0.0, "entropy": 0.3, "weights": "shifted", **changes}
    return Arm(label, {**block, "carried": {"polytope": polytope, "refresh": refresh, **changes.get("carried", {})}})


def _ssr(label: str, gradient: str, schedule: dict[str, float], **changes: Any) -> Arm:
    return Arm(label, {"rule": "ssr", "probability": schedule, "entropy": 1.0, "gradient": gradient, **changes})


# The search for settings of our own rules. Its names are the variations it tries.
SEARCH: dict[str, Arm] = {
    "search/before": _carried("before, xi 0.3"),
    "search/after": _carried("after, xi 0.3", "after"),
    "search/xi_0.1": _carried("before, xi 0.1", entropy=0.1),
    "search/xi_1": _carried("before, xi 1", entropy=1.0),
    "search/damped": _carried("before, damping 0.5", carried={"damping": 0.5}),
    "search/after_warmup": _carried("after, warm-up of full solves", "after", probability=_SHORT),
    "search/before_warmup": _carried("before, warm-up of full solves", probability=_SHORT),
    "search/before_solved": _carried("before, solved at every step", probability=1.0),
    "search/partial": _carried("before, partial gradient", gradient="partial"),
    "search/softmax": _carried("before, the softmax weighs", weights="softmax"),
    "search/plan": _carried("before, the plan weighs", weights="plan"),
    "search/mass": _carried("before, row mass 1, xi 1", polytope="mass", entropy=1.0),
    "search/mass_xi_0.3": _carried("before, row mass 1, xi 0.3", polytope="mass", entropy=0.3),
    "search/mass_plan": _carried("before, row mass 1, the plan weighs", polytope="mass", entropy=1.0, weights="plan"),
    "search/mass_after": _carried("after, row mass 1, xi 1", "after", polytope="mass", entropy=1.0),
    "search/softmax_scores": _carried(
        "before, of the softmax, xi 0.03", cost="softmax", entropy=0.03, weights="softmax"
    ),
    "search/noise": _carried("before, noise 0.3", noise={"scale": 0.3, "steps": "both"}),
    "search/quantile": Arm("Quantile Balancing", {"rule": "quantile"}),
    "search/ssr": _ssr("SSR, warm-up 30 %, implicit", "implicit", _SLOW),
    "search/ssr_short": _ssr("SSR, warm-up 20 %, implicit", "implicit", _SHORT),
    "search/ssr_partial": _ssr("SSR, warm-up 30 %, partial", "partial", _SLOW),
    "search/ssr_detach": _ssr("SSR, warm-up 30 %, detached", "detach", _SLOW),
    "search/ssr_xi_0.5": _ssr("SSR, warm-up 30 %, implicit, xi 0.5", "implicit", _SLOW, entropy=0.5),
    "search/ssr_noise": _ssr("SSR, warm-up, implicit, noise 0.3", "implicit", _SLOW, noise={"scale": 0.3}),
}
ARMS |= SEARCH
