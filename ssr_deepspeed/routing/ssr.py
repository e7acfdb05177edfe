"""The balancing rule of Selective Sinkhorn Routing: fresh potentials on a transport step."""

from __future__ import annotations

import torch
from torch import Tensor

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.ot import Solution, Sum, implicit_potentials, solve


def transport_potentials(
    logits: Tensor, config: SSRConfig, mask: Tensor | None, reduce: Sum | None
) -> tuple[Tensor, Solution]:
    """Solve the transport problem of one batch of tokens.

    Args:
        logits: `Z [T, E]`, with their graph.
        config: cost, entropy, solver and gradient.
        mask: T entries; zero marks padding, which takes no part.
        reduce: sum over the ranks balanced together, or None for this rank alone.

    Returns:
        The potentials `g [E]`, differentiable if the gradient is `"implicit"`, and the solution.
    """
    scores_TE = logits if config.cost == "linear" else torch.softmax(logits, dim=1)
    solution = solve(
        scores_TE,
        config.entropy,
        mask=mask,
        tolerance=config.solver.tolerance,
        max_iterations=config.solver.max_iterations,
        reduce=reduce,
    )
    potentials_E = solution.potentials
    if config.gradient == "implicit":
        potentials_E = implicit_potentials(scores_TE, potentials_E, config.entropy, mask, reduce)
    return potentials_E, solution
