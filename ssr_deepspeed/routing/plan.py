"""Logits and expert potentials to routes.

    softmax step     P_i = softmax(Z_i)                         potentials None
    transport step   P_i = softmax((C_i + g) / xi)              C = Z (SSR-L) or softmax(Z) (SSR-S)
    selection only   the k largest of C_i + g, weighed by softmax(Z_i)

A token takes the k experts with the largest `P_ij`, that is the largest `C_ij + g_j`. For k > 1
its weights are those `P_ij` renormalised, the KL projection of `P_i` on k experts. For k = 1 a
renormalised weight would be 1 and teach the router nothing: there the weight is `softmax(Z_i)` at
the chosen expert on both kinds of step (as in Switch, arXiv 2101.03961, and S-BASE, 2202.01169).

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_deepspeed.config import Cost
from ssr_deepspeed.kernels import fused_route, usable
from ssr_deepspeed.routing.overflow import place_overflow
from ssr_deepspeed.routing.ranks import asked_routes, routes_of_each


def compatibility(logits: Tensor, cost: Cost) -> Tensor:
    """`C [T, E]` of tokens and experts: the logits (`"linear"`) or their softmax (`"softmax"`)."""
    return logits if cost == "linear" else torch.softmax(logits, dim=1)


@dataclass(frozen=True)
class RoutePlan:
    """The routes of T tokens, best first, or moved to experts with room."""

    experts_TK: Tensor
    """int64, distinct in each row."""
    mass_TK: Tensor
    """Plan mass `P_ij` of each route (for k = 1 the softmax probability): the gradient's only path. Where routes
    were moved and k > 1, relative to the token's best placed route, for moved ones may have next to none."""
    log_mass_TK: Tensor
    """Logarithm of the plan mass, without gradient and without underflow: what a full expert keeps by."""
    used_T: Tensor | None
    """bool; False marks padding, which is never routed. None: no padding."""
    demand_E: Tensor
    """int64, routes each expert was asked to take, padding not counted, before any was moved."""
    placed_TK: Tensor | None = None
    """bool; False marks a route that no expert had a slot for. None: no route was moved."""

    def tokens(self) -> Tensor | int:
        """How many tokens there are, padding not counted."""
        return len(self.experts_TK) if self.used_T is None else self.used_T.sum()


def route(
    logits: Tensor,
    potentials: Tensor | None = None,
    *,
    k: int,
    scores: Tensor | None = None,
    entropy: float = 1.0,
    by_plan: bool = True,
    shifts: Tensor | None = None,
    detach: bool = False,
    mask: Tensor | None = None,
    capacity: int | None = None,
) -> RoutePlan:
    """Choose k experts for every token.

    Args:
        logits: router logits `Z [T, E]`, fp32 or fp64.
        potentials: `g [E]` in units of the compatibility, or None for plain softmax routing. Their
            gradient is followed if they have one.
        k: experts a token, 1 to E.
        scores: compatibility `C [T, E]` of a transport step, see `compatibility`; default the logits.
        entropy: `xi` of a transport step.
        by_plan: whether the plan weighs the experts it has chosen, or the softmax of the logits.
        shifts: row shifts `a [T]` in units of the compatibility: the plan that weighs is then the k-capacity
            polytope's, `sigmoid((C + g - a) / xi)`.
        detach: on a transport step with k > 1, give the plan no gradient.
        mask: T entries of any shape and dtype; zero marks padding.
        capacity: slots of each expert. Routes beyond them move to their token's next-best expert with a
            free slot, see `place_overflow`; their weights come from the same scores. None leaves every
            route where it is.

    Raises:
        ValueError: k below 1 or above the number of experts, or a mask of another length.
    """
    tokens, experts = logits.shape
    if not 1 <= k <= experts:
        raise ValueError(f"k = {k} experts a token out of {experts}; allowed: 1 to {experts}")
    if potentials is None:
        scores, entropy, by_plan, shifts, detach = None, 1.0, True, None, False
    scores_TE = logits if scores is None else scores
    if detach or not by_plan:
        scores_TE = scores_TE.detach()
        potentials = None if potentials is None else potentials.detach()
    used_T = _used(mask, tokens)
    weighs = _Weighs(logits, scores_TE, potentials, entropy, by_plan, shifts)
    if capacity is None and _fits_kernel(scores_TE, logits, potentials, k, weighs.is_plan):
        experts_TK, mass_TK, log_mass_TK, demand_E = fused_route(
            scores_TE, potentials, k=k, entropy=entropy, used_T=used_T
        )
        if not weighs.is_plan:
            mass_TK, log_mass_TK = weighs.mass(experts_TK, None, logits.detach())
        return RoutePlan(experts_TK, mass_TK, log_mass_TK, used_T, demand_E)
    placed_TK = None
    with torch.no_grad():
        scaled_TE = scores_TE if potentials is None else (scores_TE + potentials) / entropy
        top_TK, experts_TK = torch.topk(scaled_TE, k, dim=1)
        demand_E = routes_of_each(experts_TK, asked_routes(experts_TK, used_T), experts)
        if capacity is not None:
            log_plan_TK = top_TK - torch.logsumexp(scaled_TE, dim=1, keepdim=True)
            placement = place_overflow(experts_TK, log_plan_TK, scaled_TE, capacity, used_T)
            experts_TK, placed_TK = placement.experts_TK, placement.kept_TK
    mass_TK, log_mass_TK = weighs.mass(experts_TK, placed_TK, scaled_TE.detach() if by_plan else logits.detach())
    return RoutePlan(experts_TK, mass_TK, log_mass_TK, used_T, demand_E, placed_TK)


@dataclass(frozen=True)
class _Weighs:
    """What gives the chosen experts their mass: the plan, the k-capacity plan, or the logits' softmax."""

    logits_TE: Tensor
    scores_TE: Tensor
    potentials_E: Tensor | None
    entropy: float
    by_plan: bool
    shifts_T: Tensor | None

    @property
    def is_plan(self) -> bool:
        """Whether it is `softmax((C + g) / xi)`."""
        return self.by_plan and self.shifts_T is None

    def mass(self, experts_TK: Tensor, placed_TK: Tensor | None, whole_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Mass of the routes with its gradient, and its logarithm without, see `RoutePlan`; `whole_TE` is what they
        are a share of, as logits.

        The row's total cancels when the weights are renormalised, so for k > 1 it needs no gradient, and
        gathering before scaling keeps everything stored for the backward pass at T x K.
        """
        alone = experts_TK.shape[1] == 1
        if self.by_plan and self.potentials_E is not None:
            chosen_TK = (self.scores_TE.gather(1, experts_TK) + self.potentials_E[experts_TK]) / self.entropy
        else:
            chosen_TK = self.logits_TE.gather(1, experts_TK)
        if self.shifts_T is not None:
            chosen_TK = torch.nn.functional.logsigmoid(chosen_TK - self.shifts_T.unsqueeze(1) / self.entropy)
            log_total_T1 = torch.zeros_like(self.shifts_T).unsqueeze(1)
        else:
            log_total_T1 = torch.logsumexp(whole_TE, dim=1, keepdim=True)
        log_mass_TK = (chosen_TK - log_total_T1).detach()
        if alone:
            logits_T1 = self.logits_TE.gather(1, experts_TK)
            return (logits_T1 - torch.logsumexp(self.logits_TE, dim=1, keepdim=True)).exp(), log_mass_TK
        if placed_TK is not None:
            chosen_TK = chosen_TK.masked_fill(~placed_TK, -math.inf)
            log_total_T1 = chosen_TK.detach().amax(dim=1, keepdim=True)
            log_total_T1 = log_total_T1.clamp_min(torch.finfo(log_total_T1.dtype).min)
        return (chosen_TK - log_total_T1).exp(), log_mass_TK


def _fits_kernel(scores_TE: Tensor, logits: Tensor, potentials: Tensor | None, k: int, is_plan: bool) -> bool:
    """Whether one fused read of the scores gives the routes, and where the plan weighs their mass too."""
    # For one choice the weight is the logits' softmax: the kernel would read the softmax's.
    one_matrix = k > 1 or scores_TE is logits or not is_plan
    same_dtype = potentials is None or potentials.dtype == scores_TE.dtype
    return usable(scores_TE, scores_TE.shape[1], k) and one_matrix and same_dtype


def _used(mask: Tensor | None, tokens: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.numel() != tokens:
        raise ValueError(f"used_token has {mask.numel()} entries for {tokens} tokens; give one entry a token")
    return mask.reshape(-1) != 0
