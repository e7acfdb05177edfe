"""Sinkhorn's algorithm on the expert potentials.

One sweep is `g_j += xi log(s / c_j)` with the column sums `c` of the row-normalised plan: the
columns are set, and the next evaluation normalises the rows. It is block coordinate ascent on the
dual, so it cannot diverge; all of it runs in the log domain, so no finite score over- or
underflows.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssr_deepspeed.ot.problem import Rows, Solution, Sum, prepare, readable


def solve(
    scores: Tensor,
    entropy: float,
    *,
    mask: Tensor | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 50,
    initial: Tensor | None = None,
    reduce: Sum | None = None,
) -> Solution:
    """Find the expert potentials of the transport problem, without a host synchronisation.

    Stops at the tolerance. On an accelerator the host does not look: all `max_iterations` sweeps
    are run and those after the stop change nothing, so the result is the same. The test is on
    sums over all ranks, so ranks that share a problem stop together.

    Args:
        scores: compatibility `C [T, E]`, any float dtype; computed in fp32, fp64 stays. T may be 0.
        entropy: `xi > 0`, in units of the scores.
        mask: `[T]` or any shape with T entries, any dtype; zero leaves a token out.
        tolerance: relative column error to stop at.
        max_iterations: cap on the sweeps; 0 evaluates the initial potentials.
        initial: potentials `[E]` to start from, default zero.
        reduce: sum over the ranks that share the problem (rows local, columns global); one call
            for the number of tokens and one per evaluation.

    Raises:
        ValueError: scores not two-dimensional, entropy not positive, mask of another length.

    Source: arXiv 2511.08972; block updates in potentials form as in Peyre and Cuturi, Computational
    Optimal Transport, section 4.4.
    """
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        rows = prepare(scores, entropy, mask, reduce)
        potential_E = rows.scaled_TE.new_zeros(scores.shape[1])
        if initial is not None:
            potential_E = initial.detach().to(potential_E) / entropy
        iterations = torch.zeros((), dtype=torch.int64, device=scores.device)
        for _ in range(max_iterations):
            moved_E, error = _sweep(rows, potential_E)
            active = error > tolerance
            if readable(active) and not active:
                break
            potential_E = torch.where(active, moved_E, potential_E)
            iterations = iterations + active
        else:  # the last error was that of the potentials before the last move
            _, error = _sweep(rows, potential_E)
        potential_E = (potential_E - potential_E.mean()) * entropy
    return Solution(potential_E, error, iterations, tolerance)


def _sweep(rows: Rows, potential_E: Tensor) -> tuple[Tensor, Tensor]:
    """One Sinkhorn sweep: the moved potentials `h = g / xi`, and the error before the move."""
    column_E = rows.columns(potential_E)
    error = ((column_E - rows.target).abs() / rows.target).max()
    moved_E = potential_E + (rows.target.log() - column_E.log()).to(potential_E.dtype)
    return moved_E - moved_E.mean(), error


def plan(scores: Tensor, potentials: Tensor, entropy: float) -> Tensor:
    """The dense plan `P [T, E]`, rows summing to 1: for tests and analysis, never for training."""
    return torch.softmax((scores + potentials) / entropy, dim=1)
