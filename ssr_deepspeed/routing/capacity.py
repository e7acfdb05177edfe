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
from ssr_deepspeed.routing.ranks import asked_routes, rank_in_expert


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
    tokens, choices = plan.experts_TK.shape
    asked_TK = asked_routes(plan.experts_TK, plan.used_T) if plan.placed_TK is None else plan.placed_TK
    if capacity is not None and capacity >= tokens:
        # An expert is asked for at most one route a token: there is a slot for every token.
        token_T1 = torch.arange(tokens, device=asked_TK.device).unsqueeze(1)
        return Slots(asked_TK, token_T1.expand(tokens, choices) * asked_TK)
    # Routes that were moved fit by now: any order will do.
    log_mass_TK = None if capacity is None or plan.placed_TK is not None else plan.log_mass_TK
    rank_TK = rank_in_expert(plan.experts_TK, log_mass_TK, asked_TK, plan.demand_E.shape[0])
    kept_TK = asked_TK if capacity is None else asked_TK & (rank_TK < capacity)
    return Slots(kept_TK, rank_TK * kept_TK)


def surviving_weights(plan: RoutePlan, kept_TK: Tensor) -> Tensor:
    """Weights `[T, K]` of the routes that survived, 0 for the others.

    For k > 1 they sum to 1 for each token that kept a route with any mass; for k = 1 the weight is the
    softmax probability.
    """
    mass_TK = plan.mass_TK * kept_TK
    if mass_TK.shape[1] == 1:
        return mass_TK
    # The largest is a factor that cancels, in the gradient too: with it the sum is never too small to divide by.
    largest_T1 = mass_TK.detach().amax(dim=1, keepdim=True)
    share_TK = mass_TK / torch.where(largest_T1 == 0, 1.0, largest_T1)
    return share_TK / share_TK.sum(dim=1, keepdim=True).clamp_min(0.5)
