"""Sinkhorn-Newton-Sparse: a general solver of entropic transport between two sets of any sizes.

    minimise  <P, M> + (1 / eta) <P, log P>   over P > 0 with row sums r and column sums c

The plan is `P_ij = exp(eta (x_i + y_j - M_ij) - 1)`, and its potentials maximise the concave

    f(x, y) = -(1 / eta) sum_ij P_ij + <r, x> + <c, y>                          (arXiv 2401.12253, eq. 3)

with gradient `(r - P 1, c - P^T 1)` and Hessian `-eta [[diag(P 1), P], [P^T, diag(P^T 1)]]`. Sinkhorn
sweeps come first; Newton steps follow, on a Hessian of which only the diagonal and the largest
entries of `P` are kept. All potentials inside this file are scaled: `eta x` and `eta y`, stacked
in one vector.

Shapes: N rows, M columns, S = N + M (rows, then columns), K kept entries of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_deepspeed.ot.problem import Outcome, readable

# Armijo's constant, and the halvings after which a Newton direction counts as failed: further
# down the step is so short that a Sinkhorn sweep gains more.
SUFFICIENT, HALVINGS = 1e-4, 12
# Measured on random assignment, 50 to 500 rows, eta / n = 2 to 400: the residual asked of the linear
# system, below which Newton's iterations no longer fall; the ridge on its diagonal, relative to the
# diagonal and to the L1 error (it keeps steps finite where plans nearly fall apart, and vanishes at
# the solution); and conjugate gradient iterations per unknown, of which rounding makes many needed.
RESIDUAL, RIDGE, PER_UNKNOWN = 1e-3, 0.03, 10


@dataclass(frozen=True)
class SparseNewtonSolution(Outcome):
    """Potentials of a transport problem and how good they are. Nothing in it has been read by the host yet."""

    row_potentials: Tensor
    """`x [N]`, in units of the cost."""
    column_potentials: Tensor
    """`y [M]`, in units of the cost, mean zero (a constant may move between x and y)."""
    error: Tensor
    """Largest of `|sum_j P_ij - r_i| / r_i` and `|sum_i P_ij - c_j| / c_j` over rows and columns, 0-dim."""
    sinkhorn_iterations: Tensor
    """Sweeps of the first stage, 0-dim int64."""
    newton_iterations: Tensor
    """Iterations of the second stage, 0-dim int64."""
    fallbacks: Tensor
    """How many of `newton_iterations` took a Sinkhorn sweep because the Newton direction failed, 0-dim int64."""
    tolerance: float
    """The error asked for."""
    cost_matrix: Tensor
    """`M [N, M]` as it was solved for: fp32, or fp64 for an fp64 cost."""
    eta: float
    """Inverse entropy weight."""

    @property
    def iterations(self) -> Tensor:
        """Iterations of both stages, 0-dim int64."""
        return self.sinkhorn_iterations + self.newton_iterations

    @property
    def cost(self) -> Tensor:
        """Transport cost `<P, M>` without the entropy, 0-dim."""
        return (self.plan() * self.cost_matrix).sum()

    @property
    def result(self) -> str:
        if bool(self.converged):
            return ""
        floor = self.eta * float(self.cost_matrix.abs().max()) * torch.finfo(self.cost_matrix.dtype).eps
        return (
            f"the transport problem was left at a relative marginal error of {float(self.error):.2e} after "
            f"{int(self.sinkhorn_iterations)} Sinkhorn and {int(self.newton_iterations)} Newton iterations, above the "
            f"tolerance {self.tolerance:.0e} (rounding allows no less than about {floor:.0e}): "
            "raise newton_steps, sinkhorn_steps, density or the tolerance, or lower eta"
        )

    def plan(self) -> Tensor:
        """The plan `P [N, M]` of these potentials."""
        potential_NM = self.row_potentials.unsqueeze(1) + self.column_potentials
        return torch.exp(self.eta * (potential_NM - self.cost_matrix) - 1)


def sinkhorn_newton_sparse(
    cost: Tensor,
    eta: float,
    row_marginal: Tensor,
    column_marginal: Tensor,
    *,
    density: float | None = None,
    sinkhorn_steps: int = 20,
    newton_steps: int = 100,
    cg_steps: int | None = None,
    tolerance: float = 1e-6,
    initial: tuple[Tensor, Tensor] | None = None,
) -> SparseNewtonSolution:
    """Solve an entropic transport problem by Sinkhorn sweeps, then sparse Newton steps, each O(N M).

    Stops at the tolerance. On an accelerator the host does not look: all steps are run, and those
    after the stop change nothing. Rounding keeps the error above about `eps eta max|M|`, in fp32
    `1e-7 eta max|M|`, and above that where marginals differ by many orders of magnitude.

    Args:
        cost: `M [N, M]`, any dtype, finite; computed in fp32, fp64 stays.
        eta: inverse entropy weight, above 0, in inverse units of the cost.
        row_marginal: `r [N]`, all above 0; rows without mass do not belong into the problem.
        column_marginal: `c [M]`, all above 0, of the same sum; rescaled to it within rounding.
        density: share of the plan's entries kept in the Hessian, in (0, 1]. Default
            `2 / min(N, M)` (as published for N = M; a vertex has up to N + M - 1 entries). With more
            of them the second stage takes fewer iterations, and where marginals are very unequal the
            default may not be enough: rows of little mass then keep no entry.
        sinkhorn_steps: cap on the sweeps of the first stage; 20 as published, more (700) where
            the least cost has many plans, as with an L1 cost on a grid.
        newton_steps: cap on the iterations of the second stage; 0 is Sinkhorn's algorithm.
        cg_steps: cap on the conjugate gradient iterations of one Newton step, default `10 (N + M)`. On
            an accelerator all of them are run: choose a small one there.
        tolerance: relative marginal error to stop at, see `SparseNewtonSolution.error`.
        initial: potentials `(x [N], y [M])` to start from, default zero.

    Raises:
        ValueError: shapes that do not fit, eta or density out of range; and, where the host can
            read the values for free, marginals that are not positive or differ in their sums, a
            cost that is not finite.

    Source: arXiv 2401.12253 (ICLR 2024), algorithm 1; the line search, the preconditioner and the
    vanishing ridge are ours.
    """
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        problem = _prepare(cost, eta, row_marginal, column_marginal, density, cg_steps)
        potential_S = torch.zeros_like(problem.marginal_S)
        if initial is not None:
            potential_S = eta * torch.cat([part.detach().to(potential_S) for part in initial])
        potential_S, swept = _sinkhorn_stage(problem, potential_S, tolerance, sinkhorn_steps)
        potential_S, error, stepped, fallbacks = _newton_stage(problem, potential_S, tolerance, newton_steps)
        row_N, column_M = problem.split(potential_S / eta)
        shift = column_M.mean()
        cost = cost.detach().to(row_N.dtype)
    return SparseNewtonSolution(row_N + shift, column_M - shift, error, swept, stepped, fallbacks, tolerance, cost, eta)


@dataclass(frozen=True)
class _Problem:
    kernel_NM: Tensor
    """`-eta M - 1`: the logarithm of the plan at potentials zero."""
    marginal_S: Tensor
    kept: int
    """`K`, entries of the plan in the Hessian."""
    cg_steps: int

    def split(self, stacked_S: Tensor) -> tuple[Tensor, Tensor]:
        return stacked_S[: self.kernel_NM.shape[0]], stacked_S[self.kernel_NM.shape[0] :]

    def outer_sum(self, stacked_S: Tensor) -> Tensor:
        """`[N, M]`: each row's value plus each column's."""
        row_N, column_M = self.split(stacked_S)
        return row_N.unsqueeze(1) + column_M

    def error(self, sum_S: Tensor) -> Tensor:
        return ((sum_S - self.marginal_S).abs() / self.marginal_S).max()


def _prepare(
    cost: Tensor, eta: float, row_N: Tensor, column_M: Tensor, density: float | None, cg_steps: int | None
) -> _Problem:
    if cost.dim() != 2 or cost.numel() == 0:
        raise ValueError(f"cost must be [rows, columns], neither of them 0, got shape {tuple(cost.shape)}")
    if not 0 < eta < math.inf:
        raise ValueError(f"eta = {eta!r}; allowed: above 0 and finite")
    for name, marginal, length in zip(("row", "column"), (row_N, column_M), cost.shape, strict=True):
        if marginal.shape != (length,):
            raise ValueError(f"{name}_marginal must have shape ({length},), got {tuple(marginal.shape)}")
    if density is None:
        density = min(1.0, 2 / min(cost.shape))
    if not 0 < density <= 1:
        raise ValueError(f"density = {density!r}; allowed: above 0, at most 1")
    cost = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))
    row_N, column_M = row_N.detach().to(cost), column_M.detach().to(cost)
    if readable(cost) and not bool(torch.isfinite(eta * cost).all()):
        raise ValueError(f"cost, or cost times eta = {eta!r}, has entries that are not finite")
    row_sum, column_sum = row_N.double().sum(), column_M.double().sum()
    if readable(row_N) and readable(column_M):
        _check_marginals(row_N, column_M, float(row_sum), float(column_sum))
    column_M = column_M * (row_sum / column_sum)
    marginal_S = torch.cat([row_N, column_M.to(cost.dtype)])
    if cg_steps is None:
        cg_steps = PER_UNKNOWN * len(marginal_S)
    return _Problem(-eta * cost - 1, marginal_S, math.ceil(density * cost.numel()), cg_steps)


def _check_marginals(row_N: Tensor, column_M: Tensor, row_sum: float, column_sum: float) -> None:
    for name, marginal in (("row", row_N), ("column", column_M)):
        if not bool(((marginal > 0) & torch.isfinite(marginal)).all()):
            raise ValueError(
                f"{name}_marginal has an entry of {float(marginal.min())}; allowed: above 0 and finite "
                "(leave rows and columns without mass out of the problem)"
            )
    if abs(row_sum - column_sum) > math.sqrt(torch.finfo(row_N.dtype).eps) * row_sum:
        raise ValueError(f"row_marginal sums to {row_sum} and column_marginal to {column_sum}; allowed: equal sums")


def _exp(log_NM: Tensor) -> Tensor:
    """The exponential, at least the smallest normal number: results below it are twenty times as slow."""
    return log_NM.clamp_min(math.log(torch.finfo(log_NM.dtype).tiny)).exp_()


def _log_sum(log_NM: Tensor, dim: int) -> Tensor:
    top = log_NM.amax(dim, keepdim=True)
    return top.squeeze(dim) + _exp(log_NM - top).sum(dim).log()


def _sweep(problem: _Problem, potential_S: Tensor) -> tuple[Tensor, Tensor]:
    """One Sinkhorn sweep, rows then columns: the moved potentials, and the row error before the move."""
    before_N, column_M = problem.split(potential_S)
    target_N, target_M = problem.split(problem.marginal_S.log())
    row_N = target_N - _log_sum(problem.kernel_NM + column_M, 1)
    column_M = target_M - _log_sum(problem.kernel_NM + row_N.unsqueeze(1), 0)
    return torch.cat([row_N, column_M]), torch.expm1(before_N - row_N).abs().max()


def _sinkhorn_stage(problem: _Problem, potential_S: Tensor, tolerance: float, steps: int) -> tuple[Tensor, Tensor]:
    """Sweep to the tolerance or the cap: the potentials and the number of sweeps."""
    iterations = torch.zeros((), dtype=torch.int64, device=potential_S.device)
    plan_NM = _exp(problem.kernel_NM + problem.outer_sum(potential_S))
    error = problem.error(_sums(plan_NM))
    for step in range(steps):
        moved_S, row_error = _sweep(problem, potential_S)
        if step:  # a sweep leaves the columns exact, so the rows' error is all there is
            error = row_error
        active = ~(error <= tolerance)
        if readable(active) and not active:
            break
        potential_S = torch.where(active, moved_S, potential_S)
        iterations = iterations + active
    return potential_S, iterations


def _newton_stage(
    problem: _Problem, potential_S: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton to the tolerance or the cap: potentials, their error, iterations, sweeps among these."""
    iterations = torch.zeros((), dtype=torch.int64, device=potential_S.device)
    fallbacks = iterations
    for step in range(steps + 1):
        log_NM = problem.kernel_NM + problem.outer_sum(potential_S)
        plan_NM = _exp(log_NM)
        sum_S = _sums(plan_NM)
        error = problem.error(sum_S)
        active = ~(error <= tolerance)
        if step == steps or (readable(active) and not active):
            break
        direction_S = _direction(problem, plan_NM, sum_S)
        length = _line_search(problem, log_NM, plan_NM, sum_S, direction_S)
        moved_S = potential_S + torch.where(length > 0, length * direction_S, 0.0)
        if not (readable(length) and length > 0):
            moved_S = torch.where(length > 0, moved_S, _sweep(problem, potential_S)[0])
        potential_S = torch.where(active, moved_S, potential_S)
        iterations = iterations + active
        fallbacks = fallbacks + (active & ~(length > 0))
    return potential_S, error, iterations, fallbacks


def _sums(plan_NM: Tensor) -> Tensor:
    """Row sums, then column sums."""
    return torch.cat([plan_NM.sum(1), plan_NM.sum(0)])


def _direction(problem: _Problem, plan_NM: Tensor, sum_S: Tensor) -> Tensor:
    """Newton's direction with the `K` largest entries of the plan beside the exact diagonal.

    Entries that are dropped leave the matrix positive semidefinite (the diagonal is at least the
    sum of what is kept), and conjugate gradients from zero give an ascent direction wherever they
    stop, also on a singular matrix.
    """
    rows, columns = plan_NM.shape
    kept = torch.topk(plan_NM.reshape(-1), problem.kept, sorted=False)
    row_K = torch.div(kept.indices, columns, rounding_mode="floor")
    column_K = kept.indices % columns + rows
    to_K, from_K = torch.cat([row_K, column_K]), torch.cat([column_K, row_K])
    value_K = torch.cat([kept.values, kept.values])
    gradient_S = problem.marginal_S - sum_S
    ridge = RIDGE * gradient_S.abs().sum() / problem.marginal_S.sum()
    diagonal_S = (1 + ridge) * sum_S

    def apply(vector_S: Tensor) -> Tensor:
        return (diagonal_S * vector_S).index_add(0, to_K, value_K * vector_S[from_K])

    return conjugate_gradient(
        apply,
        gradient_S,
        lambda residual_S: residual_S / diagonal_S,
        tolerance=RESIDUAL,
        max_iterations=problem.cg_steps,
    )


def _line_search(problem: _Problem, log_NM: Tensor, plan_NM: Tensor, sum_S: Tensor, direction_S: Tensor) -> Tensor:
    """The first of the lengths 1, 1/2, 1/4 ... that raises `eta f` enough; 0 where none does."""
    slope = (problem.marginal_S - sum_S).dot(direction_S)
    move_NM = problem.outer_sum(direction_S)
    chosen, length = torch.zeros_like(slope), torch.ones_like(slope)
    for _ in range(HALVINGS):
        rise = length * slope - _remainder(log_NM, plan_NM, length * move_NM)
        good = (rise >= SUFFICIENT * length * slope) & (slope > 0)
        chosen = torch.where((chosen == 0) & good, length, chosen)
        if readable(good) and good:
            break
        length = length / 2
    return chosen


def _remainder(log_NM: Tensor, plan_NM: Tensor, move_NM: Tensor) -> Tensor:
    """`sum P (e^t - 1 - t)`, what the rise of `eta f` lacks to its linear part.

    The difference of two values of f would lose all digits near the solution; this does not.
    """
    near_NM = plan_NM * (torch.expm1(move_NM) - move_NM)
    far_NM = _exp(log_NM + move_NM) - plan_NM * (1 + move_NM)
    return torch.where(move_NM.abs() < 1, near_NM, far_NM).sum()


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    preconditioner: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """Solve `A z = right` for a symmetric positive semidefinite `A` by preconditioned conjugate gradients.

    Starts from zero, so that a singular but consistent system gets the solution without a part in
    the null space (of the preconditioned matrix). Stops at the tolerance, or where a direction
    shows no curvature. On an accelerator the host does not look: all `max_iterations` are run, and
    those after the stop change nothing.

    Args:
        apply: `A` times a tensor of the shape of `right`.
        right: right side, of any shape, one system.
        preconditioner: an approximate inverse of `A`, symmetric positive definite, times a tensor.
        tolerance: of `sqrt(<residual, preconditioner(residual)>)`, relative to its value at zero.
        max_iterations: cap on the iterations, one `apply` each.

    Source: Hestenes and Stiefel, J. Res. Nat. Bur. Standards 49 (1952); Golub and Van Loan, 11.5.
    """
    solution, residual = torch.zeros_like(right), right
    search = preconditioner(residual)
    size = (residual * search).sum()
    goal = tolerance**2 * size
    for _ in range(max_iterations):
        image = apply(search)
        curvature = (search * image).sum()
        active = (size > goal) & (curvature > 0)
        if readable(active) and not active:
            break
        length = torch.where(active, size / curvature, 0.0)
        solution = solution + length * search
        residual = residual - length * image
        smoothed = preconditioner(residual)
        next_size = (residual * smoothed).sum()
        search = torch.where(active, smoothed + next_size / size * search, search)
        size = torch.where(active, next_size, size)
    return solution
