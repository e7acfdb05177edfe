"""Sinkhorn's algorithm on the expert potentials.

One sweep is `h_j += log(s / c_j)`, `h = g / xi`, with the column sums `c` of the row-normalised
plan: the columns are set, and the next evaluation normalises the rows. It is block coordinate
ascent on the dual, so it cannot diverge. In the semi-dual's view it is Newton's method with the
Hessian `diag(c) - P^T P` cut down to `diag(c)`.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ssr_deepspeed.kernels import fused_columns, usable
from ssr_deepspeed.ot.problem import Rows, Solution, positive, prepare, readable

# Sweeps between two looks on an accelerator: together about as many kernels as a wait is worth, some 10 each.
_LOOK = 8

Columns = Callable[[Tensor], Tensor]
"""Column sums `c [E]`, fp64, over all ranks, of the plan at `h = g / xi`; never zero."""


def sinkhorn(rows: Rows, entropy: float, tolerance: float, max_iterations: int, initial_E: Tensor) -> Solution:
    """Sweep until the relative column error is within the tolerance.

    On an accelerator the host does not look, or rarely (`Rows.ended`): the sweeps after the stop that are run
    change nothing, so the result is the same. The test is on sums over all ranks, so
    ranks that share a problem stop together. One call of `rows.reduce` an evaluation. Sums over tokens
    are in the scores' precision: in fp32 the error is good to about 1e-5 for 100,000 tokens.
    """
    columns = column_sums(rows, entropy)
    potential_E = (initial_E / entropy).to(rows.scores_TE)
    iterations = torch.zeros((), dtype=torch.int64, device=potential_E.device)
    host_reads = readable(potential_E)
    looks = host_reads or rows.rare  # else not even the kernel that says what to look at
    for turn in range(max_iterations):
        moved_E, error = _sweep(rows, columns, potential_E)
        active = error > tolerance
        if looks and rows.ended(~active, turn, _LOOK):
            break
        potential_E = moved_E if host_reads else torch.where(active, moved_E, potential_E)
        iterations = iterations + active
    else:  # the last error was that of the potentials before the last move
        _, error = _sweep(rows, columns, potential_E)
    wide_E = potential_E.double() * entropy
    return Solution((wide_E - wide_E.mean()).to(potential_E), error, iterations, tolerance)


def _sweep(rows: Rows, columns: Columns, potential_E: Tensor) -> tuple[Tensor, Tensor]:
    """One Sinkhorn sweep: the moved potentials, and the error before the move."""
    relative_E = columns(potential_E) / rows.target
    return potential_E - relative_E.log().to(potential_E.dtype), (relative_E - 1).abs_().max()


def column_sums(rows: Rows, entropy: float) -> Columns:
    """The function that evaluates the column sums at given potentials.

    Three forms of the same sum. Where the exponentials of all scores of a row, and of all
    potentials, fit the number format together, `exp(C / xi)` is computed once and an evaluation
    is two matrix-vector products. Beyond that the rows are normalised at every evaluation, and
    where an expert's sum underflows even so, they are summed in the log domain, in which no finite
    score over- or underflows. The host decides, so on an accelerator it is always the last, or the
    kernel that does the same in one read of the scores.
    """
    limit = _half_range(rows)
    host_reads = readable(rows.spread)
    kernel_TE, scaled_TE = None, None
    if has_cheap_sweeps(rows, entropy):
        kernel_TE = (rows.scores_TE - rows.highest_T.unsqueeze(1)).div_(entropy).exp_()

    def columns(potential_E: Tensor) -> Tensor:
        nonlocal scaled_TE
        if kernel_TE is not None:
            lowest, highest = torch.aminmax(potential_E)
            if highest - lowest < limit:
                scale_E = (potential_E - highest).exp_()
                return ((rows.weight_T / (kernel_TE @ scale_E)) @ kernel_TE).mul_(scale_E)
        if scaled_TE is None:
            scaled_TE = rows.scaled(torch.zeros_like(potential_E), entropy)
        if usable(scaled_TE, scaled_TE.shape[1]):
            return fused_columns(scaled_TE, potential_E, rows.weight_T)
        if host_reads:
            column_E = rows.weight_T @ torch.softmax(scaled_TE + potential_E, dim=1)
            if column_E.min() > math.exp(-limit):
                return column_E
        log_plan_TE = torch.log_softmax(scaled_TE + potential_E, dim=1) + rows.weight_T.log().unsqueeze(1)
        return torch.logsumexp(log_plan_TE, dim=0).double().exp()

    return lambda potential_E: positive(rows.total(columns(potential_E)) + rows.blank)


def plan_columns(scores: Tensor, entropy: float, potentials: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Column sums `c [E]`, fp64, of the plan `softmax((C + g) / xi)`; scores, entropy and mask as for `solve`.

    Zero where no token takes part, so that such a batch adds nothing to the sums of others.
    """
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        rows = prepare(scores, entropy, mask, None)
        return column_sums(rows, entropy)((potentials / entropy).to(rows.scores_TE)) - rows.blank


def has_cheap_sweeps(rows: Rows, entropy: float) -> bool:
    """Whether a sweep is two matrix-vector products, as far as the host can see."""
    return readable(rows.spread) and bool(rows.spread / entropy < _half_range(rows))


def _half_range(rows: Rows) -> float:
    """Half of the format's exponents for the scores, and half for the potentials: 43 in fp32."""
    return -math.log(torch.finfo(rows.scores_TE.dtype).tiny) / 2
