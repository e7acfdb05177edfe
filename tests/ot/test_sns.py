import itertools
import math

import numpy
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode

from ssr_deepspeed.ot import sinkhorn_newton_sparse
from ssr_deepspeed.ot.sns import conjugate_gradient

SHAPES = [(30, 30), (12, 40), (40, 7), (1, 5), (5, 1), (1, 1)]


def problem(rows, columns, seed=0, power=1.0):
    """Cost and marginals; a high power makes the marginals very unequal."""
    generator = torch.Generator().manual_seed(seed)
    cost, row, column = (
        torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((rows, columns), rows, columns)
    )
    row, column = (row + 0.01) ** power, (column + 0.01) ** power
    return cost, row / row.sum(), column / column.sum()


def assignment(size, seed=0):
    cost, _, _ = problem(size, size, seed)
    return cost, torch.full((size,), 1 / size, dtype=torch.float64)


def log_sinkhorn(cost, eta, row, column):
    """POT's plan, in another normalisation of the entropy that leaves the plan as it is."""
    return torch.from_numpy(
        ot.bregman.sinkhorn_log(
            row.numpy(), column.numpy(), cost.numpy(), 1 / eta, numItermax=200_000, stopThr=1e-14, warn=False
        )
    )


@pytest.mark.parametrize("power", [1.0, 4.0])
@pytest.mark.parametrize("eta", [5.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_equals_an_independent_solvers(shape, eta, power):
    cost, row, column = problem(*shape, power=power)
    solution = sinkhorn_newton_sparse(cost, eta, row, column, tolerance=1e-10).check()
    plan = solution.plan()
    torch.testing.assert_close(plan, log_sinkhorn(cost, eta, row, column), rtol=0, atol=1e-9)
    torch.testing.assert_close(plan.sum(1), row, rtol=2e-10, atol=0)
    torch.testing.assert_close(plan.sum(0), column, rtol=2e-10, atol=0)
    torch.testing.assert_close(solution.cost, (plan * cost).sum())
    assert abs(float(solution.column_potentials.mean())) < 1e-12


def test_the_cost_goes_to_the_linear_programmes_as_eta_grows():
    cost, row, column = problem(15, 25)
    least = ot.emd2(row.numpy(), column.numpy(), cost.numpy())
    solution = sinkhorn_newton_sparse(cost, 3000.0, row, column, tolerance=1e-9, newton_steps=300).check()
    # The entropy of a plan is at most log(N M), so the regularised plan costs that much over eta more at most.
    assert -1e-9 <= float(solution.cost) - least <= math.log(15 * 25) / 3000


@pytest.mark.parametrize("eta", [1200.0, 5000.0])
def test_at_weak_regularisation_the_rounded_plan_is_the_optimal_assignment(eta):
    cost, mass = assignment(40, seed=3)
    solution = sinkhorn_newton_sparse(cost, eta, mass, mass, tolerance=1e-9, newton_steps=300).check()
    rows, columns = linear_sum_assignment(cost.numpy())
    assert solution.plan().argmax(1).tolist() == columns.tolist()
    least = float(cost[rows, columns].mean())
    assert float(solution.cost) == pytest.approx(least, abs=math.log(40) / eta)


def potential(cost, eta, row, column, x, y):
    """The paper's Lyapunov function, equation 3, as it is printed."""
    return -torch.exp(eta * (-cost + x.unsqueeze(1) + y) - 1).sum() / eta + row @ x + column @ y


def test_a_step_with_the_whole_hessian_is_newtons_own(monkeypatch):
    """Gradient and Hessian come from automatic differentiation, the step from a pseudo-inverse."""
    monkeypatch.setattr("ssr_deepspeed.ot.sns.RESIDUAL", 1e-13)
    monkeypatch.setattr("ssr_deepspeed.ot.sns.RIDGE", 0.0)
    eta, (cost, row, column) = 20.0, problem(8, 11)
    before = sinkhorn_newton_sparse(cost, eta, row, column, sinkhorn_steps=6, newton_steps=0, tolerance=1e-15)
    after = sinkhorn_newton_sparse(
        cost, eta, row, column, sinkhorn_steps=6, newton_steps=1, tolerance=1e-15, density=1.0
    )
    assert (int(after.sinkhorn_iterations), int(after.newton_iterations), int(after.fallbacks)) == (6, 1, 0)
    start = torch.cat([before.row_potentials, before.column_potentials])

    def value(z):
        return potential(cost, eta, row, column, z[:8], z[8:])

    gradient = torch.func.grad(value)(start)
    step = -torch.linalg.pinv(torch.func.hessian(value)(start), rtol=1e-10) @ gradient
    expected = start + step
    plan = torch.exp(eta * (expected[:8].unsqueeze(1) + expected[8:] - cost) - 1)
    torch.testing.assert_close(after.plan(), plan, rtol=1e-9, atol=1e-13)
    # The solver's error is the gradient of f, relative to the marginals.
    relative = gradient.abs() / torch.cat([row, column])
    assert float(before.error) == pytest.approx(float(relative.max()), rel=1e-8)


def test_every_newton_step_raises_the_potential():
    eta, (cost, mass) = 1200.0, assignment(60)
    values = []
    for steps in range(12):
        solution = sinkhorn_newton_sparse(cost, eta, mass, mass, newton_steps=steps, tolerance=1e-13)
        values.append(
            float(potential(cost, eta, mass, mass, solution.row_potentials, solution.column_potentials)) * eta
        )
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))


def test_newton_needs_far_fewer_iterations_than_sinkhorn():
    cost, mass = assignment(100)
    newton = sinkhorn_newton_sparse(cost, 300.0, mass, mass, tolerance=1e-8).check()
    sinkhorn = sinkhorn_newton_sparse(
        cost, 300.0, mass, mass, tolerance=1e-8, sinkhorn_steps=50_000, newton_steps=0
    ).check()
    assert int(sinkhorn.iterations) > 10 * int(newton.iterations)
    torch.testing.assert_close(newton.plan(), sinkhorn.plan(), rtol=0, atol=1e-9)


def test_more_kept_entries_take_fewer_newton_steps():
    cost, mass = assignment(100)
    counts = [
        int(
            sinkhorn_newton_sparse(cost, 600.0, mass, mass, density=share / 100, tolerance=1e-9)
            .check()
            .newton_iterations
        )
        for share in (2, 5, 100)
    ]
    assert counts[0] > counts[1] >= counts[2]


def test_a_constant_on_a_row_or_column_of_the_cost_moves_into_its_potential():
    cost, row, column = problem(20, 30)
    by_row, by_column = torch.randn(20, 1, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    first = sinkhorn_newton_sparse(cost, 30.0, row, column, tolerance=1e-11).check()
    second = sinkhorn_newton_sparse(cost + by_row + by_column, 30.0, row, column, tolerance=1e-11).check()
    torch.testing.assert_close(second.plan(), first.plan(), rtol=1e-9, atol=1e-14)
    moved = second.column_potentials - first.column_potentials
    torch.testing.assert_close(moved, by_column - by_column.mean(), rtol=0, atol=1e-10)


def test_potentials_that_differ_by_a_constant_are_the_same_start():
    cost, row, column = problem(20, 30)
    solved = sinkhorn_newton_sparse(cost, 30.0, row, column, tolerance=1e-11).check()
    start = (solved.row_potentials + 7.0, solved.column_potentials - 7.0)
    again = sinkhorn_newton_sparse(cost, 30.0, row, column, tolerance=1e-10, initial=start).check()
    assert int(again.iterations) == 0
    torch.testing.assert_close(again.row_potentials, solved.row_potentials)


def test_totals_other_than_one_scale_the_plan():
    cost, row, column = problem(9, 14)
    plan = sinkhorn_newton_sparse(cost, 30.0, row, column, tolerance=1e-11).check().plan()
    thousand = sinkhorn_newton_sparse(cost, 30.0, 1000 * row, 1000 * column, tolerance=1e-11).check().plan()
    torch.testing.assert_close(thousand, 1000 * plan)


@pytest.mark.parametrize("start", [1e3, -1e3, 1e6])
def test_where_newton_cannot_go_a_sweep_goes(start):
    """Potentials so far off that the plan overflows or vanishes, and no sweeps before Newton."""
    cost, row, column = problem(10, 12)
    initial = (torch.full((10,), start, dtype=torch.float64), torch.zeros(12, dtype=torch.float64))
    solution = sinkhorn_newton_sparse(
        cost, 30.0, row, column, sinkhorn_steps=0, initial=initial, tolerance=1e-10
    ).check()
    assert int(solution.fallbacks) >= 1
    torch.testing.assert_close(solution.plan(), log_sinkhorn(cost, 30.0, row, column), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [1e4, 1e7])
def test_a_huge_eta_stays_finite_and_the_result_is_truthful(eta, dtype):
    cost, mass = assignment(25)
    cost, mass = cost.to(dtype), mass.to(dtype)
    solution = sinkhorn_newton_sparse(cost, eta, mass, mass, newton_steps=20, tolerance=1e-6)
    assert torch.isfinite(solution.row_potentials).all()
    assert torch.isfinite(solution.column_potentials).all()
    plan = torch.exp(
        eta * (solution.row_potentials.double()[:, None] + solution.column_potentials.double() - cost.double()) - 1
    )
    error = max(float((plan.sum(axis) * 25 - 1).abs().max()) for axis in (0, 1))
    if dtype == torch.float64:
        assert float(solution.error) == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert bool(solution.result) == (not float(solution.error) <= 1e-6)


def test_a_capped_solution_says_so():
    cost, mass = assignment(40)
    solution = sinkhorn_newton_sparse(cost, 1200.0, mass, mass, sinkhorn_steps=3, newton_steps=2, tolerance=1e-9)
    assert float(solution.error) > 1e-9
    with pytest.raises(RuntimeError, match=r"after 3 Sinkhorn and 2 Newton.*raise newton_steps"):
        solution.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_other_types_are_solved_in_fp32(dtype):
    cost, row, column = problem(20, 30)
    cost = (8 * cost).to(dtype)
    solution = sinkhorn_newton_sparse(cost, 1.0, row, column, tolerance=1e-5).check()
    exact = sinkhorn_newton_sparse(cost.double(), 1.0, row, column, tolerance=1e-12).check()
    assert solution.row_potentials.dtype == torch.float32
    torch.testing.assert_close(solution.plan().double(), exact.plan(), rtol=1e-4, atol=0)


def test_stopping_early_and_running_to_the_cap_give_the_same(monkeypatch):
    cost, row, column = problem(15, 15)
    arguments = {"sinkhorn_steps": 8, "newton_steps": 12, "cg_steps": 60, "tolerance": 1e-9, "density": 0.5}
    early = sinkhorn_newton_sparse(cost, 60.0, row, column, **arguments).check()
    monkeypatch.setattr("ssr_deepspeed.ot.sns.readable", lambda tensor: False)
    full = sinkhorn_newton_sparse(cost, 60.0, row, column, **arguments)
    assert 0 < int(early.newton_iterations) < 12
    for name in ("row_potentials", "column_potentials", "sinkhorn_iterations", "newton_iterations", "fallbacks"):
        assert torch.equal(getattr(early, name), getattr(full, name)), name


def test_nothing_is_read_from_the_device():
    with FakeTensorMode():
        mass = torch.full((6,), 1 / 6)
        solution = sinkhorn_newton_sparse(torch.rand(6, 6), 50.0, mass, mass, newton_steps=2, cg_steps=5)
        assert solution.plan().shape == (6, 6)


def test_it_compiles_into_one_graph():
    cost, row, column = problem(6, 5)

    def solve(cost, row, column):
        return sinkhorn_newton_sparse(
            cost, 20.0, row, column, sinkhorn_steps=3, newton_steps=2, cg_steps=6, tolerance=1e-9
        ).plan()

    compiled = torch.compile(solve, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(cost, row, column), solve(cost, row, column))


def test_arguments_are_left_alone():
    arguments = problem(6, 8)
    before = [tensor.clone() for tensor in arguments]
    sinkhorn_newton_sparse(arguments[0], 20.0, arguments[1], arguments[2])
    assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True))


ONES = torch.ones(3) / 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sinkhorn_newton_sparse(torch.rand(3), 1.0, ONES, ONES), r"\(3,\)"),
        (lambda: sinkhorn_newton_sparse(torch.rand(0, 3), 1.0, torch.ones(0), ONES), r"\(0, 3\)"),
        (lambda: sinkhorn_newton_sparse(torch.rand(3, 3), 0.0, ONES, ONES), "eta = 0.0"),
        (lambda: sinkhorn_newton_sparse(torch.rand(3, 4), 1.0, ONES, ONES), r"column_marginal.*\(4,\)"),
        (lambda: sinkhorn_newton_sparse(torch.rand(3, 3), 1.0, ONES, 2 * ONES), r"sums to 1\.0.* to 2\.0"),
        (lambda: sinkhorn_newton_sparse(torch.rand(3, 3), 1.0, ONES, torch.tensor([0.0, 0.5, 0.5])), "entry of 0.0"),
        (lambda: sinkhorn_newton_sparse(torch.rand(3, 3), 1.0, ONES, ONES, density=1.5), "density = 1.5"),
        (lambda: sinkhorn_newton_sparse(torch.full((3, 3), math.inf), 1.0, ONES, ONES), "not finite"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_conjugate_gradients_solve_a_definite_system():
    square = torch.randn(12, 12, dtype=torch.float64)
    matrix, right = square @ square.T + torch.eye(12), torch.randn(12, dtype=torch.float64)
    solution = conjugate_gradient(
        lambda v: matrix @ v, right, lambda v: v / matrix.diagonal(), tolerance=1e-12, max_iterations=100
    )
    torch.testing.assert_close(
        solution, torch.from_numpy(numpy.linalg.solve(matrix.numpy(), right.numpy())), rtol=1e-8, atol=1e-10
    )


def test_conjugate_gradients_give_a_singular_system_its_least_solution():
    weight = torch.rand(9, 9, dtype=torch.float64)
    weight = weight + weight.T
    laplacian = torch.diag(weight.sum(0)) - weight
    right = torch.randn(9, dtype=torch.float64)
    right = right - right.mean()
    solution = conjugate_gradient(
        lambda v: laplacian @ v, right, lambda v: v.clone(), tolerance=1e-12, max_iterations=50
    )
    torch.testing.assert_close(solution, torch.linalg.pinv(laplacian) @ right, rtol=1e-8, atol=1e-10)


def test_conjugate_gradients_leave_zero_at_zero_and_stop_at_the_cap():
    def same(v):
        return v.clone()

    assert torch.equal(conjugate_gradient(same, torch.zeros(4), same, tolerance=1e-6, max_iterations=5), torch.zeros(4))
    matrix, right = torch.diag(torch.arange(1.0, 5.0)), torch.ones(4)
    one = conjugate_gradient(lambda v: matrix @ v, right, same, tolerance=0.0, max_iterations=1)
    torch.testing.assert_close(one, right * (right @ right) / (right @ matrix @ right))
