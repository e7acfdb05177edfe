"""Gradient of the expert potentials with respect to the scores, and what of it costs nothing.

At the solution the column sums are constant, `c(g, C) = s`. By the implicit function theorem (as
in Eisenberger et al., A Unified Framework for Implicit Sinkhorn Differentiation, CVPR 2022, there
for both marginals' potentials; here with the rows eliminated, tested by finite differences), for a
gradient `w = dl/dg`,

    (diag(c) - P^T P) z = w,      dl/dC_i = -P_i * (z - <P_i, z>)

with `P` the plan. The matrix is a graph Laplacian with null space `1`, so the E x E system is
solved on the complement of the constant vector.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssr_deepspeed.ot.problem import Sum, prepare


def implicit_potentials(
    scores: Tensor, potentials: Tensor, entropy: float, mask: Tensor | None = None, reduce: Sum | None = None
) -> Tensor:
    """Give solved potentials their gradient: same values, differentiable in the scores.

    The backward pass recomputes the plan from the scores (nothing of size T x E is stored beside
    them) and solves one E x E system in fp64. Over several ranks it calls `reduce` once. There are no
    second derivatives: asking for them raises.

    Args:
        scores: `C [T, E]`, the scores the potentials were solved for, with their graph.
        potentials: `g [E]` as `solve` returned them.
        entropy: `xi`, as given to `solve`.
        mask: as given to `solve`.
        reduce: as given to `solve`.
    """
    return _ImplicitPotentials.apply(scores, potentials, entropy, mask, reduce)


def centred_scores(scores: Tensor, mask: Tensor | None = None, reduce: Sum | None = None) -> Tensor:
    """The same scores, whose gradient lacks its mean over the tokens: `dl/dC_ij` less the mean of `dl/dC_.j`.

    A shift of one expert's scores for all tokens is undone by the expert's potential, so a plan has no gradient
    along it. With potentials held constant there is one; this takes it out, and nothing else. Over several
    ranks the backward pass calls `reduce` once, with `E + 1` numbers. No second derivatives.

    Args:
        scores: `C [T, E]`, with their graph.
        mask: T entries; zero leaves a token out.
        reduce: sum over the ranks that share the problem.
    """
    return _CentredScores.apply(scores, mask, reduce)


def unrolled_potentials(scores: Tensor, entropy: float, sweeps: int, mask: Tensor | None = None) -> Tensor:
    """Potentials after a number of Sinkhorn sweeps, differentiated through every one of them.

    The yardstick of `implicit_potentials`, for tests and studies: it stores the plan of every
    sweep, and it knows one process.

    Args:
        scores: `C [T, E]`, with their graph.
        entropy: `xi`.
        sweeps: Sinkhorn sweeps from zero potentials.
        mask: T entries; zero leaves a token out.

    Returns:
        `g [E]`, mean zero, in units of the scores.
    """
    experts = scores.shape[1]
    weight_T = prepare(scores, entropy, mask, reduce=None).weight_T
    scores = torch.where(weight_T.unsqueeze(1) > 0, scores, 0.0)
    potential_E = scores.new_zeros(experts)
    for _ in range(sweeps):
        log_plan_TE = torch.log_softmax(scores / entropy + potential_E, dim=1) + weight_T.log().unsqueeze(1)
        log_target = (weight_T.sum() / experts).log()
        potential_E = potential_E + log_target - torch.logsumexp(log_plan_TE, dim=0)
        potential_E = potential_E - potential_E.mean()
    return potential_E * entropy


class _CentredScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None, reduce: Sum | None) -> Tensor:
        ctx.reduce = reduce
        ctx.save_for_backward(mask)
        return scores.view_as(scores)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_TE: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        if mask is None and ctx.reduce is None:
            return gradient_TE - gradient_TE.mean(0), None, None
        if mask is None:
            used_T1 = torch.ones_like(gradient_TE[:, :1])
        else:
            used_T1 = (mask.reshape(-1, 1) != 0).to(gradient_TE.dtype)
        total = torch.cat(
            [(gradient_TE * used_T1).sum(0, dtype=torch.float64), used_T1.sum(dtype=torch.float64).view(1)]
        )
        if ctx.reduce is not None:
            total = ctx.reduce(total)
        mean_E = (total[:-1] / total[-1].clamp_min(1)).to(gradient_TE)
        return gradient_TE - mean_E * used_T1, None, None


class _ImplicitPotentials(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, potentials: Tensor, entropy: float, mask: Tensor | None, reduce: Sum | None
    ) -> Tensor:
        ctx.save_for_backward(scores, potentials, mask)
        ctx.entropy, ctx.reduce = entropy, reduce
        return potentials.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        scores, potentials, mask = ctx.saved_tensors
        with torch.autocast(scores.device.type, enabled=False):
            return _pull_back(ctx, scores, potentials, mask, gradients[0]), None, None, None, None


def _pull_back(ctx: Any, scores: Tensor, potentials: Tensor, mask: Tensor | None, slope_E: Tensor) -> Tensor:
    experts = scores.shape[1]
    rows = prepare(scores, ctx.entropy, mask, reduce=None)
    plan_TE = torch.softmax(rows.scaled(potentials, ctx.entropy), dim=1) * rows.weight_T.unsqueeze(1)
    wide_TE = plan_TE.double()
    packed = torch.cat([slope_E.double().unsqueeze(0), wide_TE.sum(0, keepdim=True), wide_TE.T @ wide_TE])
    if ctx.reduce is not None:
        packed = ctx.reduce(packed)
    gradient_E, column_E, overlap_EE = packed[0], packed[1], packed[2:]
    # The constant lifts the null space and leaves the solution on its complement as it is;
    # the ridge is for experts that no token can reach.
    lifted_EE = torch.diag(column_E + 1e-12 * column_E.mean()) - overlap_EE + column_E.sum() / experts**2
    z_E = torch.linalg.solve_ex(lifted_EE, gradient_E - gradient_E.mean()).result
    z_E = torch.where(column_E.sum() > 0, z_E - z_E.mean(), 0.0).to(plan_TE.dtype)
    gradient_TE = -plan_TE * (z_E - (plan_TE @ z_E).unsqueeze(1))
    return gradient_TE.to(scores.dtype)
