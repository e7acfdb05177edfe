"""Newton's method on the semi-dual: a convex function of the E expert potentials alone.

With the rows eliminated, `D(h) = sum_i LSE(C_i / xi + h) - s sum_j h_j` in units `h = g / xi` has

    gradient  c - s,  c_j = sum_i P_ij          Hessian  diag(c) - P^T P

the Hessian a graph Laplacian with null space `1` (a shift of all potentials changes nothing).
The recipe around the step makes it safe from a cold start: a few Sinkhorn sweeps, entropy annealed
from the spread of the scores down to the one asked for, steps capped, a line search on `D`, and
a Sinkhorn sweep wherever the step fails.

The loop knows its problem only as a function that evaluates value, column sums and Hessian, so
the k-capacity polytope (`capacity.py`) and the sparsified Hessian go through it too.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssr_deepspeed.ot.problem import Rows, Solution, positive
from ssr_deepspeed.ot.sns import conjugate_gradient

# Found on 40 problems, E 8 to 256, entropy 1 to 0.01, solved to 1e-9: without annealing Newton stalls at 0.01.
_SWEEPS = 2
_ANNEALING = 4.0
_STAGE_ERROR = 0.3
_FAR = 0.5  # a first error from which Newton needs annealing
_LONGEST_STEP = 50.0
_ARMIJO = 1e-4
_SHORTEST_STEP = 2.0**-6


class Terms(NamedTuple):
    """The semi-dual at one point, over all ranks, in fp64."""

    value: Tensor
    """`D`, 0-dim."""
    column_E: Tensor
    """Column sums `c`, above 0."""
    hessian_EE: Tensor
    """Second derivatives in `h = g / xi`; zero row sums, or a sparsified stand-in."""


Evaluate = Callable[[Tensor, Tensor], Terms]
"""Potentials `g [E]` and entropy `xi` (0-dim) to the semi-dual's terms; one collective."""


class _State(NamedTuple):
    """Where the iteration stands; every entry a tensor."""

    potential_E: Tensor
    """`g`, accepted."""
    value: Tensor
    column_E: Tensor
    error: Tensor
    """Relative column error at `g`, at the current entropy."""
    entropy: Tensor
    direction_E: Tensor
    """Of the trial step, in units of h."""
    step: Tensor
    slope: Tensor
    """Directional derivative of `D`, negative."""
    free: Tensor
    """Whether the trial is taken whatever the value there: a sweep, or a new entropy."""
    done: Tensor
    iterations: Tensor


def newton(
    rows: Rows, entropy: float, tolerance: float, max_iterations: int, initial_E: Tensor, sparse: bool = False
) -> Solution:
    """Solve the transport problem by semi-dual Newton; an evaluation is `O(T E^2)`, one collective.

    Args:
        sparse: keep only the largest plan entries in the Hessian and solve by conjugate gradients,
            see `sparse_hessian`.
    """
    solve = _solve_by_conjugate_gradients if sparse else solve_directly
    hessian = sparse_hessian if sparse else full_hessian

    def evaluate(potential_E: Tensor, temperature: Tensor) -> Terms:
        scaled_TE = rows.scaled(potential_E.to(rows.scores_TE), temperature.to(rows.scores_TE))
        highest_T1 = scaled_TE.amax(dim=1, keepdim=True)
        plan_TE = scaled_TE.sub_(highest_T1).exp_()
        total_T1 = plan_TE.sum(dim=1, keepdim=True)
        plan_TE = drop_denormal_products(plan_TE.mul_(rows.weight_T.unsqueeze(1) / total_T1))
        value = linear_term(rows, rows.target, potential_E / temperature)
        value = value + ((highest_T1 + total_T1.log()).squeeze(1) * rows.weight_T).sum(dtype=torch.float64)
        column_E = plan_TE.sum(0, dtype=torch.float64)
        value, column_E, overlap_EE = reduce_terms(rows, value, column_E, hessian(plan_TE))
        column_E = positive(column_E + rows.blank)
        return Terms(value, column_E, torch.diag(column_E) - overlap_EE)

    start = cooling_start(rows, entropy)
    return minimise(evaluate, solve, rows.target, initial_E, entropy, start, tolerance, max_iterations, rows)


def linear_term(rows: Rows, target: Tensor, potential_E: Tensor) -> Tensor:
    """This rank's share of `-s sum_j h_j`: summed with the rest, all ranks compare the same value, to the bit."""
    return -target * potential_E.sum() * rows.weight_T.sum(dtype=torch.float64) / rows.count


def drop_denormal_products(plan_TE: Tensor) -> Tensor:
    """Zero, in place, entries whose products leave the normal numbers: below 1e-19 in fp32.

    They change no sum, and a processor multiplies denormal numbers a hundred times slower.
    """
    return torch.threshold_(plan_TE, math.sqrt(torch.finfo(plan_TE.dtype).tiny), 0.0)


def full_hessian(plan_TE: Tensor) -> Tensor:
    """`P^T P`. Never in TF32 or bf16: fp64 on an accelerator, whose fp32 products may be either."""
    wide_TE = plan_TE if plan_TE.device.type == "cpu" else plan_TE.double()
    return (wide_TE.T @ wide_TE).double()


def sparse_hessian(plan_TE: Tensor) -> Tensor:
    """`P_s^T P_s` with the two largest entries of each token's row.

    Sinkhorn-Newton-Sparse keeps `2 / n` of the Hessian's entries (arXiv 2401.12253); taken row by
    row, ranks agree on them without exchanging anything. The rows of the plan sum to 1, so
    `diag(c) - P_s^T P_s` is what is left of the sparsified system once its rows are eliminated.
    """
    kept_TK, experts_TK = plan_TE.topk(min(2, plan_TE.shape[1]), dim=1)
    return full_hessian(torch.zeros_like(plan_TE).scatter_(1, experts_TK, kept_TK))


def reduce_terms(rows: Rows, value: Tensor, column_E: Tensor, matrix_EE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum value, columns and a symmetric matrix over the ranks: `1 + E + E (E + 1) / 2` numbers, one collective."""
    if rows.reduce is None:
        return value, column_E, matrix_EE
    experts = column_E.shape[0]
    upper, right = torch.triu_indices(experts, experts, device=column_E.device)
    packed = rows.reduce(torch.cat([value.reshape(1), column_E, matrix_EE[upper, right]]))
    full_EE = torch.zeros_like(matrix_EE)
    full_EE[upper, right] = packed[1 + experts :]
    full_EE[right, upper] = packed[1 + experts :]
    return packed[0], packed[1 : 1 + experts], full_EE


def cooling_start(rows: Rows, entropy: float) -> Tensor:
    """Entropy at which annealing starts: the root mean square of the scores about their row's mean.

    There every plan is spread out and Newton is safe. One collective.
    """
    centred_TE = rows.scores_TE.double() - rows.scores_TE.mean(dim=1, keepdim=True, dtype=torch.float64)
    square = rows.total((centred_TE.square().mean(dim=1) * rows.weight_T).sum())
    return (square / rows.count).sqrt().clamp_min(entropy)


def minimise(
    evaluate: Evaluate,
    solve: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    initial_E: Tensor,
    entropy: float,
    start: Tensor,
    tolerance: float,
    max_iterations: int,
    rows: Rows,
) -> Solution:
    """Minimise a semi-dual by the safeguarded Newton iteration.

    Every turn evaluates one trial point and accepts it or shortens the step, so that all ranks do the
    same number of turns: those after the end change nothing, and are run where the host does not read
    the device (`Rows.ended`). The first turn evaluates the start at the entropy asked for; only if that
    is far from balanced (relative error above 0.5) is the entropy annealed. Where the cap comes before
    the end of that, the better of the start and the last potentials is returned.

    Args:
        evaluate: the problem.
        solve: Hessian and right-hand side to the direction.
        target: `s`, column sum asked for.
        initial_E: potentials to start from, fp64.
        start: entropy to anneal from, 0-dim, at least `entropy`.
        max_iterations: cap on evaluations after the first.
        rows: the tokens; their dtype is that of the result.
    """
    state = _begin(initial_E, entropy, target)
    first_error = state.error
    for turn in range(max_iterations + 1):
        terms = evaluate(state.potential_E + state.entropy * state.step * state.direction_E, state.entropy)
        sweep = (state.entropy > entropy) & (1 <= turn <= _SWEEPS)
        moved = _advance(state, terms, target, solve, entropy, tolerance, sweep)
        if turn == 0:
            first_error = moved.error
            stage = torch.where(moved.error > _FAR, start, moved.entropy)
        else:
            stage = _next_stage(moved, entropy)
        moved = _cool(moved, stage)
        state = _State(*(torch.where(state.done, old, new) for old, new in zip(state, moved, strict=True)))
        if rows.ended(state.done, turn, every=1):  # a turn is hundreds of kernels
            potential_E, error = state.potential_E, state.error
            break
    else:  # annealing may have been cut short: the last error may be that of another entropy
        terms = evaluate(state.potential_E, torch.full_like(state.entropy, entropy))
        error = (terms.column_E / target - 1).abs().max()
        potential_E = torch.where(error > first_error, initial_E, state.potential_E)
        error = torch.minimum(error, first_error)
    potential_E = (potential_E - potential_E.mean()).to(rows.scores_TE.dtype)
    return Solution(potential_E, error, state.iterations, tolerance)


def _begin(initial_E: Tensor, entropy: float, target: Tensor) -> _State:
    zero_E = torch.zeros_like(initial_E)
    zero = torch.zeros((), dtype=torch.float64, device=initial_E.device)
    no = torch.zeros((), dtype=torch.bool, device=initial_E.device)
    return _State(
        potential_E=initial_E,
        value=zero,
        column_E=zero_E + target,
        error=zero + torch.inf,
        entropy=zero + entropy,
        direction_E=zero_E,
        step=zero,
        slope=zero,
        free=~no,
        done=no,
        iterations=torch.zeros((), dtype=torch.int64, device=initial_E.device),
    )


def _cool(state: _State, entropy: Tensor) -> _State:
    """The state before the first evaluation at another entropy; unchanged at the same one."""
    same = entropy == state.entropy
    return state._replace(
        entropy=entropy,
        direction_E=torch.where(same, state.direction_E, 0.0),
        free=state.free | ~same,
    )


def _advance(
    state: _State,
    terms: Terms,
    target: Tensor,
    solve: Callable[[Tensor, Tensor], Tensor],
    entropy: float,
    tolerance: float,
    sweep: Tensor,
) -> _State:
    """Accept the trial point and choose the next direction, or shorten the step."""
    error = (terms.column_E / target - 1).abs().max()
    # Near the minimum `D` no longer resolves a step; there a falling error says enough.
    accepted = state.free | (terms.value <= state.value + _ARMIJO * state.step * state.slope)
    accepted = accepted | (error < 0.7 * state.error)
    accepted = accepted & torch.isfinite(terms.value)
    moved_E = state.potential_E + state.entropy * state.step * state.direction_E
    # Where the plan falls apart into groups of experts, a capped step hardly helps: sweep in between.
    stalled = accepted & ~state.free & (error > 0.9 * state.error)
    potential_E = torch.where(accepted, moved_E, state.potential_E)
    value = torch.where(accepted, terms.value, state.value)
    column_E = torch.where(accepted, terms.column_E, state.column_E)
    error = torch.where(accepted, error, state.error)

    last = state.entropy <= entropy
    done = last & (error <= tolerance)
    gradient_E = target - column_E
    direction_E = solve(terms.hessian_EE, gradient_E)
    longest = direction_E.abs().max()
    direction_E = direction_E * (_LONGEST_STEP / longest.clamp_min(_LONGEST_STEP))
    slope = -(gradient_E * direction_E).sum()
    step = torch.where(accepted, 1.0, state.step / 2)
    failed = torch.where(accepted, ~(slope < 0), step < _SHORTEST_STEP)
    failed = failed | sweep | stalled
    direction_E = torch.where(accepted, direction_E, state.direction_E)
    # A Sinkhorn sweep, also a shortened one, never raises `D`, from any point.
    sweep_E = (target / column_E).log().clamp(-_LONGEST_STEP, _LONGEST_STEP)
    direction_E = torch.where(failed, sweep_E, direction_E)
    return _State(
        potential_E,
        value,
        column_E,
        error,
        state.entropy,
        direction_E,
        torch.where(failed, 1.0, step),
        torch.where(accepted, slope, state.slope),
        failed,
        done,
        state.iterations + (accepted & (state.direction_E != 0).any()),
    )


def _next_stage(state: _State, entropy: float) -> Tensor:
    """The entropy of the next turn: colder once the potentials, just accepted, are good enough here."""
    ready = (state.error <= _STAGE_ERROR) & (state.step == 1)
    return torch.where(ready, (state.entropy / _ANNEALING).clamp_min(entropy), state.entropy)


def solve_directly(hessian_EE: Tensor, right_E: Tensor) -> Tensor:
    """The Laplacian system on the complement of its null space, in fp64."""
    experts = right_E.shape[0]
    trace = hessian_EE.diagonal().sum()
    # The constant lifts the null space; the ridge is for experts that no token reaches.
    lifted_EE = hessian_EE + trace / experts**2
    lifted_EE = lifted_EE + torch.diag(torch.full_like(right_E, 1e-12) * trace / experts)
    solution_E = torch.linalg.solve_ex(lifted_EE, right_E).result
    return solution_E - solution_E.mean()


def _solve_by_conjugate_gradients(hessian_EE: Tensor, right_E: Tensor) -> Tensor:
    diagonal_E = hessian_EE.diagonal().clamp_min(torch.finfo(right_E.dtype).tiny)
    solution_E = conjugate_gradient(
        lambda vector_E: hessian_EE @ vector_E,
        right_E,
        lambda vector_E: vector_E / diagonal_E,
        tolerance=1e-10,
        max_iterations=2 * right_E.shape[0],
    )
    return solution_E - solution_E.mean()
