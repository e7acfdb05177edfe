"""The balancing rule of Selective Sinkhorn Routing: fresh potentials on a transport step."""

from __future__ import annotations

from torch import Tensor

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.ot import Solution, Sum, implicit_potentials, solve


def transport_potentials(
    scores: Tensor, config: SSRConfig, mask: Tensor | None, reduce: Sum | None
) -> tuple[Tensor, Solution]:
    """Solve the transport problem of one batch of tokens.

    Args:
        scores: compatibility `C [T, E]`, with its graph.
        config: entropy, solver and gradient.
        mask: T entries; zero marks padding, which takes no part.
        reduce: sum over the ranks balanced together, or None for this rank alone.

    Returns:
        The potentials `g [E]`, differentiable if the gradient is `"implicit"`, and the solution.
    """
    solution = solve(
        scores,
        config.entropy,
        method=config.solver.name,
        mask=mask,
        tolerance=config.solver.tolerance,
        max_iterations=config.solver.max_iterations,
        reduce=reduce,
    )
    potentials_E = solution.potentials
    if config.gradient == "implicit":
        potentials_E = implicit_potentials(scores, potentials_E, config.entropy, mask, reduce)
    return potentials_E, solution
