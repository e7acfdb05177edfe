"""Choosing k experts for every token in one read of the scores.

For finite scores the same routes, masses and gradients as `ssr_deepspeed.routing.route`, as an operator
that torch traces without looking inside. Its gradient has none of its own (no double backward).

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssr_deepspeed.kernels.launch import MAX_CHOICES, check_scores, check_vector, power_of_two, tiling


def fused_route(
    scores_TE: Tensor,
    potentials_E: Tensor | None,
    *,
    k: int,
    entropy: float,
    used_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the k experts with the largest plan mass `softmax((C + g) / xi)` for every token.

    Equal `C + g` go to the lowest expert first. A row with a NaN, with plus infinity or with nothing
    finite gets valid experts and a mass of NaN. For k > 1 the gradient holds the row's total
    constant, for it cancels when the weights are renormalised. For k = 1 the mass is `softmax(C)` at
    the chosen expert: right where the compatibility is the logits (`cost = "linear"`), and without
    gradient to the potentials.

    Args:
        scores_TE: compatibility `C`, fp32.
        potentials_E: `g`, fp32, in units of the scores; None for zero.
        k: experts a token, 1 to E and at most 16.
        entropy: `xi > 0`, in units of the scores.
        used_T: bool; False marks padding, which is routed but not counted. None: no padding.

    Returns:
        Experts int64 `[T, K]`, best first and distinct; their mass fp32 `[T, K]`; its logarithm fp32
        `[T, K]` without gradient (the plan's, also for k = 1); routes asked of each expert int64 `[E]`.

    Raises:
        ValueError: a shape, dtype or number outside the above.
    """
    check_scores("scores", scores_TE)
    tokens, experts = scores_TE.shape
    if not 1 <= k <= min(experts, MAX_CHOICES):
        raise ValueError(f"k = {k} experts a token out of {experts}; allowed: 1 to {min(experts, MAX_CHOICES)}")
    if not entropy > 0:
        raise ValueError(f"entropy = {entropy!r}; allowed: above 0")
    if potentials_E is not None:
        check_vector("potentials", potentials_E, torch.float32, experts)
    if used_T is not None:
        check_vector("used_T", used_T, torch.bool, tokens)
    mass_TK, log_mass_TK, experts_TK, demand_E = _route(scores_TE, potentials_E, used_T, k, entropy)
    return experts_TK, mass_TK, log_mass_TK.detach(), demand_E


@torch.library.custom_op(
    "ssr_deepspeed::route",
    mutates_args=(),
    schema="(Tensor scores, Tensor? potentials, Tensor? used, int k, float entropy)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _route(
    scores_TE: Tensor, potentials_E: Tensor | None, used_T: Tensor | None, k: int, entropy: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = scores_TE.shape
    experts_TK = scores_TE.new_empty(tokens, k, dtype=torch.int64)
    mass_TK, log_mass_TK = scores_TE.new_empty(tokens, k), scores_TE.new_empty(tokens, k)
    demand_E = scores_TE.new_zeros(experts, dtype=torch.int64)
    if tokens:
        from ssr_deepspeed.kernels.programs import route_program

        tiles = tiling(tokens, experts)
        with torch.cuda.device_of(scores_TE):
            route_program[(tiles.programs,)](
                scores_TE.contiguous(),
                None if potentials_E is None else potentials_E.contiguous(),
                None if used_T is None else used_T.contiguous().view(torch.uint8),
                experts_TK,
                mass_TK,
                log_mass_TK,
                demand_E,
                tokens,
                1.0 / entropy,
                E=experts,
                K=k,
                ROWS=tiles.rows,
                COLUMNS=tiles.columns,
                CHOICES=max(2, power_of_two(k)),
            )
    return mass_TK, log_mass_TK, experts_TK, demand_E


@_route.register_fake
def _(
    scores_TE: Tensor, potentials_E: Tensor | None, used_T: Tensor | None, k: int, entropy: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = scores_TE.shape
    return (
        scores_TE.new_empty(tokens, k),
        scores_TE.new_empty(tokens, k),
        scores_TE.new_empty(tokens, k, dtype=torch.int64),
        scores_TE.new_empty(experts, dtype=torch.int64),
    )


@torch.library.custom_op(
    "ssr_deepspeed::route_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor mass, Tensor chosen, Tensor? scores, int experts, float entropy,"
    " bool for_potentials) -> (Tensor, Tensor)",
)
def _route_backward(
    gradient_TK: Tensor,
    mass_TK: Tensor,
    experts_TK: Tensor,
    scores_TE: Tensor | None,
    experts: int,
    entropy: float,
    for_potentials: bool,
) -> tuple[Tensor, Tensor]:
    tokens, k = mass_TK.shape
    tiles = tiling(tokens, experts)
    scores_gradient_TE = mass_TK.new_empty(tokens, experts)
    potentials_gradient_PE = mass_TK.new_empty(tiles.programs, experts) if for_potentials else None
    if tokens:
        from ssr_deepspeed.kernels.programs import route_backward_program

        with torch.cuda.device_of(mass_TK):
            route_backward_program[(tiles.programs,)](
                gradient_TK.contiguous(),
                mass_TK,
                experts_TK,
                None if scores_TE is None else scores_TE.contiguous(),
                scores_gradient_TE,
                potentials_gradient_PE,
                tokens,
                1.0 / entropy,
                E=experts,
                K=k,
                ROWS=tiles.rows,
                COLUMNS=tiles.columns,
            )
    if potentials_gradient_PE is None:
        return scores_gradient_TE, mass_TK.new_empty(0)
    return scores_gradient_TE, potentials_gradient_PE.sum(dim=0)


@_route_backward.register_fake
def _(
    gradient_TK: Tensor,
    mass_TK: Tensor,
    experts_TK: Tensor,
    scores_TE: Tensor | None,
    experts: int,
    entropy: float,
    for_potentials: bool,
) -> tuple[Tensor, Tensor]:
    tokens = mass_TK.shape[0]
    return mass_TK.new_empty(tokens, experts), mass_TK.new_empty(experts if for_potentials else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores_TE, _, _, k, entropy = inputs
    mass_TK, _, experts_TK, _ = output
    # Only one expert's softmax needs its row again.
    ctx.save_for_backward(experts_TK, mass_TK, scores_TE if k == 1 else None)
    ctx.experts, ctx.entropy = scores_TE.shape[1], entropy


def _differentiate(ctx: Any, gradient_TK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    experts_TK, mass_TK, scores_TE = ctx.saved_tensors
    for_potentials = ctx.needs_input_grad[1] and scores_TE is None
    scores_gradient_TE, potentials_gradient_E = _route_backward(
        gradient_TK, mass_TK, experts_TK, scores_TE, ctx.experts, ctx.entropy, for_potentials
    )
    return scores_gradient_TE, potentials_gradient_E if for_potentials else None, None, None, None


_route.register_autograd(_differentiate, setup_context=_keep)
