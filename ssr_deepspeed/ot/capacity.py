"""The k-capacity polytope: counts, not mass, made even.

    maximise  <P, C> + xi H(P)   over 0 <= P <= 1,  sum_j P_ij = k,  sum_i P_ij = s = k T / E

with the binary entropy `H = -sum P log P + (1 - P) log(1 - P)`. Its solution is
`P_ij = sigmoid((C_ij + g_j - a_i) / xi)`: expert potentials `g` and a shift `a_i` for each token.
As `xi` falls, P becomes the indicator of the k experts with the largest `C_ij + g_j`, and the
even column sums become even counts. (Row sums of 1, as in `problem.py`, balance mass: another
objective, not this one with another constant.)

With the rows eliminated the semi-dual in `h = g / xi` is

    D(h) = sum_i [ sum_j log(1 + exp(C_ij / xi + h_j - b_i)) + k b_i ] - s sum_j h_j,  b = a / xi
    gradient  c - s            Hessian  diag(sum_i w_i) - W^T diag(1 / sum_j w_ij) W,  w = P (1 - P)

and `h_j += log(s / c_j)` never raises it, because `log(1 + e^(x + d)) <= log(1 + e^x) + P (e^d - 1)`:
the same Newton iteration with the same fallback serves.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_deepspeed.ot.newton import (
    Terms,
    cooling_start,
    drop_denormal_products,
    linear_term,
    minimise,
    reduce_terms,
    solve_directly,
)
from ssr_deepspeed.ot.problem import Rows, Solution, Sum, ended, positive, prepare, start_at

# From between the k-th and (k + 1)-th score, Newton steps after which column sums are good to a thousandth.
_FEW = 2
# Where a token's experts are far apart the slope is rounding alone, and so would the step be: there any shift serves.
_LONGEST = 4.0
# Turns between two looks on an accelerator. Of random fp32 scores, at entropies of 1 to 1/20 of their spread, all
# rows have found their shift in the fourth turn or the fifth; a turn is 20 kernels.
_LOOK = 5


@dataclass(frozen=True)
class CapacitySolution(Solution):
    """Expert potentials for selection, and the row shifts that turn them into weights."""

    shifts: Tensor
    """`a [T]`, in units of the scores, so that `sum_j sigmoid((C_ij + g_j - a_i) / xi) = k`."""


def solve_capacity(
    scores: Tensor,
    entropy: float,
    k: int,
    *,
    mask: Tensor | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 50,
    initial: Tensor | None = None,
    reduce: Sum | None = None,
) -> CapacitySolution:
    """Find potentials under which every expert is asked for `k T / E` routes, up to the entropy.

    Counts are even only as the entropy goes to zero; from a cold start it is annealed down to
    `entropy`. The error is that of the columns; rows sum to k as far as their scores have digits. On an
    accelerator the host waits for the device once or twice an iteration: not a solve for every step.

    Args:
        scores: compatibility `C [T, E]`, any float dtype; computed in fp32, fp64 stays.
        entropy: `xi > 0`, in units of the scores.
        k: experts a token, 1 to E. With `k = E` every route is taken: potentials zero, shifts `-inf`.
        mask, tolerance, max_iterations, initial, reduce: as for `solve`; one collective an iteration, on an
            accelerator two.

    Raises:
        ValueError: as `solve`, and for k below 1 or above E (a token uses no expert twice).

    Source: two-marginal transport with unit capacities, as in Korman and McCann, Optimal
    transportation with capacity constraints (2015); the dual above is derived here and tested.
    """
    experts = scores.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"k = {k} experts a token out of {experts}; allowed: 1 to {experts}")
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        # Whom a token leaves out is the same problem with all signs changed; the sweeps do better on few.
        sign = -1 if 2 * k > experts else 1
        chosen = experts - k if sign < 0 else k
        rows = prepare(sign * scores, entropy, mask, reduce, rare=True)
        start_E = start_at(initial, rows)
        if k == experts:
            none = torch.zeros_like(rows.target)
            shifts_T = torch.full_like(rows.weight_T, -math.inf)
            return CapacitySolution(
                torch.zeros_like(rows.scores_TE[0:0].sum(0)), none, none.long(), tolerance, shifts_T
            )
        solved = minimise(
            lambda potential_E, temperature: _evaluate(rows, chosen, potential_E, temperature),
            solve_directly,
            chosen * rows.target,
            sign * start_E,
            entropy,
            cooling_start(rows, entropy),
            tolerance,
            max_iterations,
            rows,
        )
        shifts_T = row_shifts(rows.scaled(solved.potentials, entropy), chosen) * entropy + rows.highest_T
    return CapacitySolution(sign * solved.potentials, solved.error, solved.iterations, tolerance, sign * shifts_T)


def _evaluate(rows: Rows, k: int, potential_E: Tensor, temperature: Tensor) -> Terms:
    scaled_TE = rows.scaled(potential_E.to(rows.scores_TE), temperature.to(rows.scores_TE))
    shift_T = row_shifts(scaled_TE, k)
    logit_TE = scaled_TE - shift_T.unsqueeze(1)
    plan_TE = torch.sigmoid(logit_TE)
    slack_TE = drop_denormal_products(torch.sigmoid(-logit_TE) * plan_TE * rows.weight_T.unsqueeze(1))
    value_T = torch.nn.functional.softplus(logit_TE).sum(1) + k * shift_T
    value = linear_term(rows, k * rows.target, potential_E / temperature)
    value = value + (value_T * rows.weight_T).sum(dtype=torch.float64)
    column_E = (plan_TE * rows.weight_T.unsqueeze(1)).sum(0, dtype=torch.float64)
    wide_TE = slack_TE.double()
    overlap_EE = wide_TE.T @ (wide_TE / wide_TE.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
    hessian_EE = torch.diag(wide_TE.sum(0)) - overlap_EE
    value, column_E, hessian_EE = reduce_terms(rows, value, column_E, hessian_EE)
    return Terms(value, positive(column_E + k * rows.blank), hessian_EE)


def capacity_columns(
    scores: Tensor,
    entropy: float,
    k: int,
    potentials: Tensor,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Column sums of the k-capacity plan at given potentials, good to 0.1 %: rows sum to k up to two Newton steps.

    Args:
        scores: compatibility `C [T, E]`, fp32 or fp64.
        entropy: `xi > 0`, in units of the scores.
        k: experts a token, below E.
        potentials: `g [E]`, in units of the scores.
        mask: T entries; zero leaves a token out.

    Returns:
        `c [E]`, fp64, and the row shifts `a [T]` in units of the scores.
    """
    with torch.no_grad():
        scaled_ET = ((scores.detach() + potentials) / entropy).t().contiguous()
        shift_T = _first_shifts(scaled_ET, k)
        for _ in range(_FEW):
            plan_ET = torch.sigmoid(scaled_ET - shift_T)
            shift_T = shift_T + _newton_step(plan_ET, plan_ET.sum(0), k).clamp(-_LONGEST, _LONGEST)
        plan_ET = torch.sigmoid(scaled_ET - shift_T)
        if mask is not None:
            plan_ET = torch.where(mask.reshape(-1) != 0, plan_ET, 0.0)
        return plan_ET.sum(1, dtype=torch.float64), shift_T * entropy


def row_shifts(scaled_TE: Tensor, k: int) -> Tensor:
    """The root `b_i` of `sum_j sigmoid(x_ij - b_i) = k` for every row, `k < E`.

    Newton's method inside a bracket that shrinks with every evaluation, bisection where a step
    would leave it. The sum falls with b, and with all scores equal to the smallest or largest of
    a row its root is known: that is the first bracket.
    """
    # Tokens last: sums over a handful of experts are then sums of long vectors.
    scaled_ET = scaled_TE.t().contiguous()
    offset = math.log(k / (scaled_ET.shape[0] - k))
    low_T, high_T = scaled_ET.amin(0) - offset, scaled_ET.amax(0) - offset
    shift_T = _first_shifts(scaled_ET, k).clamp(low_T, high_T)
    enough = 8 * torch.finfo(scaled_TE.dtype).eps * k
    for turn in range(60):  # in which bisection alone halves fp32's whole mantissa twice over
        plan_ET = torch.sigmoid(scaled_ET - shift_T)
        total_T = plan_ET.sum(0)
        excess_T = total_T - k
        found_T = excess_T.abs() <= enough
        if ended(found_T, turn, _LOOK):
            break
        low_T = torch.where(excess_T > 0, shift_T, low_T)
        high_T = torch.where(excess_T < 0, shift_T, high_T)
        newton_T = shift_T + _newton_step(plan_ET, total_T, k)
        # A step too small for the digits stays at an end of the bracket: that is no reason to bisect.
        inside_T = (newton_T >= low_T) & (newton_T <= high_T)
        moved_T = torch.where(inside_T, newton_T, (low_T + high_T) / 2)
        shift_T = torch.where(found_T, shift_T, moved_T)
    return shift_T


def _first_shifts(scaled_ET: Tensor, k: int) -> Tensor:
    """Between the k-th and the next score of every token: the root as the entropy goes to zero."""
    return torch.topk(scaled_ET, k + 1, dim=0).values[-2:].mean(0)


def _newton_step(plan_ET: Tensor, total_T: Tensor, k: int) -> Tensor:
    """Newton's step on the log-odds of the mean, `logit(sum_j P_ij / E)`, which is linear in the shift where the
    scores of a row are equal, and nearly so where they are not: the sum itself is as steep as an exponential."""
    experts = plan_ET.shape[0]
    slope_T = (plan_ET * (1 - plan_ET)).sum(0).clamp_min(torch.finfo(plan_ET.dtype).tiny)
    other_T = experts - total_T
    return total_T * other_T / (experts * slope_T) * (torch.log(total_T / other_T) - math.log(k / (experts - k)))
