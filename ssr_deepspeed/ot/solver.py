"""One call for all solvers of the transport problem.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ssr_deepspeed.ot.newton import newton
from ssr_deepspeed.ot.problem import Rows, Solution, Sum, prepare, readable, start_at
from ssr_deepspeed.ot.sinkhorn import has_cheap_sweeps, sinkhorn

# A cheap sweep costs 1/20 to 1/50 of a Newton step, and where sweeps are cheap few are needed.
_SWEEPS_FIRST = 16
# Sweeps of the first stage in the problems of arXiv 2401.12253.
_SNS_SWEEPS = 20
# Above, the E x E systems outweigh what they save.
_MOST_EXPERTS = 1024


def _adaptive(rows: Rows, entropy: float, tolerance: float, max_iterations: int, initial_E: Tensor) -> Solution:
    sweeps = _SWEEPS_FIRST
    if readable(rows.spread):
        # One answer for all ranks, or their collectives would not match.
        dear = rows.total(torch.tensor(not has_cheap_sweeps(rows, entropy), device="cpu"))
        sweeps = 0 if dear else sweeps
    if rows.scores_TE.shape[1] > _MOST_EXPERTS:
        sweeps = max_iterations
    return _two_stages(rows, entropy, tolerance, max_iterations, initial_E, sweeps=sweeps, sparse=False)


def _two_stages(
    rows: Rows,
    entropy: float,
    tolerance: float,
    max_iterations: int,
    initial_E: Tensor,
    *,
    sweeps: int,
    sparse: bool,
) -> Solution:
    """Sinkhorn sweeps, and Newton from where they stand if they were not enough."""
    if not sweeps:
        return newton(rows, entropy, tolerance, max_iterations, initial_E, sparse)
    swept = sinkhorn(rows, entropy, tolerance, min(sweeps, max_iterations), initial_E)
    if max_iterations <= sweeps or (readable(swept.converged) and swept.converged):
        return swept
    stepped = newton(rows, entropy, tolerance, max_iterations - sweeps, swept.potentials.double(), sparse)
    return Solution(stepped.potentials, stepped.error, swept.iterations + stepped.iterations, tolerance)


_METHODS: dict[str, Callable[[Rows, float, float, int, Tensor], Solution]] = {
    "sinkhorn": sinkhorn,
    "newton": newton,
    "sns": functools.partial(_two_stages, sweeps=_SNS_SWEEPS, sparse=True),
    "adaptive": _adaptive,
}


def solve(
    scores: Tensor,
    entropy: float,
    *,
    method: str = "sinkhorn",
    tolerance: float = 1e-3,
    max_iterations: int = 50,
    mask: Tensor | None = None,
    initial: Tensor | None = None,
    reduce: Sum | None = None,
    rare: bool = False,
) -> Solution:
    """Find the expert potentials of the transport problem, without a host synchronisation unless it is `rare`.

    Stops at the tolerance. On an accelerator the host does not look: all iterations are run and
    those after the stop change nothing, so the result is the same (but for `"adaptive"`, whose second
    stage always begins there). The test is on sums over all ranks, so ranks that share a problem
    stop together.

    Args:
        scores: compatibility `C [T, E]`, any float dtype; computed in fp32, fp64 stays. T may be 0.
        entropy: `xi > 0`, in units of the scores.
        method: `"sinkhorn"`, `O(T E)` a sweep, best where the entropy is not far below the spread of
            the scores; `"newton"`, `O(T E^2)` a step, 2 to 25 of them down to an entropy of 1/100 of the
            spread; `"sns"`, 20 sweeps, then Newton with a sparsified Hessian and conjugate gradients,
            which may take hundreds of steps where plans are dense; `"adaptive"`, 16 sweeps where they
            are cheap, then Newton if they were not enough, by rules measured with `benchmarks/solvers.py`.
        tolerance: relative column error to stop at.
        max_iterations: cap on sweeps, or evaluations of Newton's method; 0 evaluates the initial
            potentials.
        mask: `[T]` or any shape with T entries, any dtype; zero leaves a token out.
        initial: potentials `[E]` to start from, default zero.
        reduce: sum over the ranks that share the problem (rows local, columns global): E numbers an
            evaluation of Sinkhorn, `1 + E + E (E + 1) / 2` one of Newton, one call each, and up to three
            calls with one number at the start.
        rare: not every step solves a problem, so that on an accelerator the host may wait for it now and then
            to leave out what changes nothing; a further call of `reduce` with one number each time.

    Raises:
        ValueError: unknown method, scores not two-dimensional, entropy not positive and finite, mask or
            initial potentials of another length.

    Source: arXiv 2511.08972; block updates in potentials form as in Peyre and Cuturi, Computational
    Optimal Transport, section 4.4; sparsification from arXiv 2401.12253.
    """
    if method not in _METHODS:
        raise ValueError(f"method = {method!r}; allowed: {list(_METHODS)}")
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        rows = prepare(scores, entropy, mask, reduce, rare)
        return _METHODS[method](rows, entropy, tolerance, max_iterations, start_at(initial, rows))


def plan(scores: Tensor, potentials: Tensor, entropy: float) -> Tensor:
    """The dense plan `P [T, E]`, rows summing to 1: for tests and analysis, never for training."""
    return torch.softmax((scores + potentials) / entropy, dim=1)
