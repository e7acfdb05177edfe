"""The routes of each expert: how many, and in which order.

Shapes: T tokens, E experts, K choices a token, N = T K routes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def asked_routes(experts: Tensor, used: Tensor | None) -> Tensor:
    """Which of the routes `[T, K]` ask for a slot, bool: all but those of padding (`used` False, `[T]`)."""
    asked = torch.ones_like(experts, dtype=torch.bool)
    return asked if used is None else asked & used.unsqueeze(1)


def routes_of_each(experts: Tensor, counted: Tensor, count: int) -> Tensor:
    """Routes of each of `count` experts, int64 `[E]`, among those that `counted` (bool `[T, K]`) marks."""
    none_E = experts.new_zeros(count)
    return none_E.scatter_add_(0, experts.reshape(-1), counted.reshape(-1).long())


def rank_in_expert(experts: Tensor, log_mass: Tensor | None, asked: Tensor, count: int) -> Tensor:
    """How many routes of its expert come before each route: larger mass first, then the lower index.

    One sort of the T x K routes. A dense `[T, E]` cumulative sum is up to a few milliseconds faster
    for 8 experts (32,768 tokens, CPU), and up to 270 times slower for 256.

    Args:
        experts: `[T, K]`, int64, below `count`.
        log_mass: `[T, K]`, at most 0, compared in fp32: -inf after all numbers, NaN after -inf. None:
            by index alone.
        asked: `[T, K]`, bool; False takes a route out, and its own rank means nothing.
        count: number of experts.

    Returns:
        int64 `[T, K]`.
    """
    key_TK = torch.where(asked, experts, count)
    if log_mass is None:
        bits, key_TK = 0, key_TK.int()
    else:
        # Floats without their sign are ordered as their 31 bits are, and these grow as the mass falls.
        bits = 31
        key_TK = (key_TK << bits) | log_mass.detach().float().abs().view(torch.int32)
    sorted_N, route_N = torch.sort(key_TK.reshape(-1), stable=True)
    first_E = torch.searchsorted(sorted_N, torch.arange(count + 1, dtype=sorted_N.dtype, device=experts.device) << bits)
    rank_N = torch.arange(sorted_N.shape[0], device=experts.device) - first_E[(sorted_N >> bits).long()]
    return torch.empty_like(rank_N).scatter_(0, route_N, rank_N).view_as(experts)
