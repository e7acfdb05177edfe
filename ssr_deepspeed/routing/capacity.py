"""Expert capacity: which routes an expert has room for, and the slot each of them takes.

An expert that is asked for more routes than its capacity keeps those with the largest plan mass,
DeepSpeed's `drop_policy="probs"`, for every k and without a random choice. A token's weights are
renormalised over the routes that survive.

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_deepspeed.routing.plan import RoutePlan


@dataclass(frozen=True)
class Slots:
    """Where each route goes."""

    kept_TK: Tensor
    """bool; False marks a route without a slot (expert full, or padding)."""
    locations_TK: Tensor
    """int64, slot in the expert's buffer, below the capacity and unique for each expert; 0 if not kept."""


def expert_capacity(tokens: int, experts: int, k: int, factor: float, minimum: int, multiple: int = 1) -> int:
    """Slots of each expert: `ceil(tokens / experts * factor * k)`, at least `minimum`.

    Rounded in fp32 as DeepSpeed's `_capacity` does, so that both gates give the same buffers, then
    up to a multiple of `multiple` (the tensor-parallel size, whose ranks share the slots out).
    """
    slots = math.ceil(_fp32(_fp32(tokens / experts) * _fp32(factor * k)))
    return math.ceil(max(slots, minimum) / multiple) * multiple


def _fp32(value: float) -> float:
    """The nearest fp32 number, in plain Python so that a compiled gate can fold it."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def fill_slots(plan: RoutePlan, capacity: int | None) -> Slots:
    """Give each route a slot.

    Args:
        plan: the routes.
        capacity: slots of each expert, or None for as many as were asked for.
    """
    tokens, _ = plan.experts_TK.shape
    experts = plan.demand_E.shape[0]
    asked_TK = torch.ones_like(plan.experts_TK, dtype=torch.bool)
    if plan.used_T is not None:
        asked_TK = asked_TK & plan.used_T.unsqueeze(1)
    taken_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=asked_TK.device)
    taken_TE.scatter_(1, plan.experts_TK, asked_TK)
    if capacity is not None and capacity < tokens:
        priority_TE = torch.full_like(taken_TE, -math.inf, dtype=plan.log_mass_TK.dtype)
        priority_TE.scatter_(1, plan.experts_TK, plan.log_mass_TK.masked_fill(~asked_TK, -math.inf))
        first_CE = torch.topk(priority_TE, capacity, dim=0, sorted=False).indices
        taken_TE &= torch.zeros_like(taken_TE).scatter_(0, first_CE, True)
    kept_TK = taken_TE.gather(1, plan.experts_TK)
    locations_TE = torch.cumsum(taken_TE, dim=0) - 1
    return Slots(kept_TK, locations_TE.gather(1, plan.experts_TK) * kept_TK)


def surviving_weights(plan: RoutePlan, kept_TK: Tensor) -> Tensor:
    """Weights `[T, K]` of the routes that survived, 0 for the others.

    For k > 1 they sum to 1 for each token that kept a route; the denominator has DeepSpeed's floor,
    the fp32 machine epsilon. For k = 1 the weight is the softmax probability.
    """
    mass_TK = plan.mass_TK * kept_TK
    if mass_TK.shape[1] == 1:
        return mass_TK
    return mass_TK / mass_TK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
