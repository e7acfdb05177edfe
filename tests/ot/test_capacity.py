import itertools
import math

import pytest
import scipy.optimize
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ssr_deepspeed.ot.problem
from ssr_deepspeed.ot import solve_capacity
from ssr_deepspeed.ot.capacity import capacity_columns, row_shifts
from ssr_deepspeed.ot.problem import ended
from tests.gloo import run_ranks
from tests.ot.problems import Operations, problem

KINDS = ["random", "collapsed", "clustered", "one-hot", "constant", "fewer tokens than experts"]


def as_on_an_accelerator(monkeypatch, captured=False):
    """Let values of CPU tensors cost a wait, or be out of reach as in a CUDA graph."""
    monkeypatch.setattr(ssr_deepspeed.ot.problem, "readable", lambda tensor: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: captured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)


def dense(scores, solution, entropy):
    return torch.sigmoid((scores + solution.potentials - solution.shifts.unsqueeze(1)) / entropy)


@pytest.mark.parametrize("k", [1, 2, 5, 7])
@pytest.mark.parametrize("entropy", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_k_and_columns_to_the_mean(kind, entropy, k):
    scores = problem(kind)
    solution = solve_capacity(scores, entropy, k, tolerance=1e-9, max_iterations=100).check()
    plan = dense(scores, solution, entropy)
    tokens = len(scores)
    torch.testing.assert_close(plan.sum(1), torch.full((tokens,), k, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), k * tokens / 8, dtype=torch.float64), rtol=1e-8, atol=0)
    assert abs(float(solution.potentials.mean())) < 1e-9


@pytest.mark.parametrize("kind", ["random", "collapsed"])
def test_the_plan_equals_a_general_optimisers(kind):
    """L-BFGS on the dual in shifts and potentials together, neither eliminated."""
    scores, entropy, k = problem(kind, 12, 5), 0.7, 2

    def dual(point):
        point = torch.tensor(point, requires_grad=True)
        shifts, potentials = point[:12], point[12:]
        logit = (scores + potentials - shifts.unsqueeze(1)) / entropy
        value = entropy * torch.nn.functional.softplus(logit).sum() + k * shifts.sum() - k * 12 / 5 * potentials.sum()
        value.backward()
        return value.item(), point.grad.numpy()

    found = scipy.optimize.minimize(
        dual, [0.0] * 17, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-11, "maxiter": 5000}
    )
    best = torch.tensor(found.x)
    expected = torch.sigmoid((scores + best[12:] - best[:12].unsqueeze(1)) / entropy)
    solution = solve_capacity(scores, entropy, k, tolerance=1e-11, max_iterations=100).check()
    torch.testing.assert_close(dense(scores, solution, entropy), expected, rtol=0, atol=1e-6)


def test_at_a_small_entropy_it_is_the_linear_programme():
    scores, k = problem("clustered", 24, 6) + 0.3 * problem("random", 24, 6), 2
    rows = torch.kron(torch.eye(24), torch.ones(1, 6))
    columns = torch.kron(torch.ones(1, 24), torch.eye(6))
    best = scipy.optimize.linprog(
        -scores.flatten().numpy(),
        A_eq=torch.cat([rows, columns]).numpy(),
        b_eq=[k] * 24 + [k * 24 / 6] * 6,
        bounds=(0, 1),
    )
    solution = solve_capacity(scores, 1e-3, k, tolerance=1e-6, max_iterations=100).check()
    value = (dense(scores, solution, 1e-3) * scores).sum()
    assert float(value) == pytest.approx(-best.fun, rel=1e-3)


def test_counts_even_out_as_the_entropy_falls():
    scores = problem("clustered", 1024, 32) + 0.3 * problem("random", 1024, 32)
    raw = scores.topk(2, dim=1).indices.flatten().bincount(minlength=32).max() / 64 - 1
    worst = [raw]
    for entropy in (1.0, 0.3, 0.1, 0.03):
        potentials = solve_capacity(scores, entropy, 2, tolerance=1e-6, max_iterations=100).check().potentials
        counts = (scores + potentials).topk(2, dim=1).indices.flatten().bincount(minlength=32)
        worst.append(counts.max() / 64 - 1)
    assert all(later < earlier for earlier, later in itertools.pairwise(worst))
    assert worst[-1] < 0.1


def test_a_token_that_takes_every_expert_has_nothing_to_choose():
    solution = solve_capacity(problem("random"), 1.0, 8).check()
    assert torch.equal(solution.potentials, torch.zeros(8, dtype=torch.float64))
    assert torch.equal(dense(problem("random"), solution, 1.0), torch.ones(96, 8, dtype=torch.float64))


@pytest.mark.parametrize("k", [0, 9])
def test_more_choices_than_experts_are_refused(k):
    with pytest.raises(ValueError, match=rf"k = {k} experts a token out of 8; allowed: 1 to 8"):
        solve_capacity(problem("random"), 1.0, k)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_scores_stay_finite_and_the_result_is_truthful(scale):
    scores = torch.randn(64, 8) * scale
    solution = solve_capacity(scores, 1.0, 2)
    assert torch.isfinite(solution.potentials).all()
    assert torch.isfinite(solution.shifts).all()
    columns = dense(scores.double(), solution, 1.0).sum(0)
    assert bool(solution.result) == (float((columns / 16 - 1).abs().max()) > 1e-3)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_constant_for_a_token_costs_no_digits(offset):
    scores = (64 * problem("random")).round() / 64
    shifted = (scores + offset).float()
    solution = solve_capacity(shifted, 0.25, 2, tolerance=1e-4).check()
    expected = solve_capacity(shifted.double() - offset, 0.25, 2, tolerance=1e-6).check()
    torch.testing.assert_close(solution.potentials.double(), expected.potentials, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["random", "collapsed", "clustered"])
def test_nearly_all_experts_are_as_easy_as_few(kind):
    for entropy in (0.1, 0.01):
        few, many = (solve_capacity(problem(kind), entropy, k).check() for k in (1, 7))
        assert int(many.iterations) <= 2 * int(few.iterations) + 10


def test_padding_and_bad_tokens_take_no_part():
    scores = problem("clustered")
    mask = torch.arange(96) % 5 != 0
    settings = {"tolerance": 1e-10, "max_iterations": 100}
    expected = solve_capacity(scores[mask][1:], 0.3, 2, **settings)
    scores[1, 3] = math.nan
    got = solve_capacity(scores, 0.3, 2, mask=mask, **settings)
    torch.testing.assert_close(got.potentials, expected.potentials)


def test_no_token_at_all_gives_zero_potentials():
    solution = solve_capacity(torch.randn(4, 6), 1.0, 2, mask=torch.zeros(4)).check()
    assert torch.equal(solution.potentials, torch.zeros(6))


def test_a_warm_start_at_the_solution_needs_no_iteration():
    first = solve_capacity(problem("clustered"), 0.1, 2, tolerance=1e-8, max_iterations=100).check()
    again = solve_capacity(problem("clustered"), 0.1, 2, tolerance=1e-7, initial=first.potentials)
    assert int(again.iterations) == 0


def test_nothing_is_read_from_the_device():
    with FakeTensorMode():
        assert solve_capacity(torch.randn(32, 8), 1.0, 2, max_iterations=3).shifts.shape == (32,)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_is_asked_rarely_and_ends_where_the_cpu_does(monkeypatch, kind, k):
    scores = problem(kind, 96).float()
    near = solve_capacity(scores + 0.1 * torch.randn(scores.shape), 0.3, k).potentials
    solutions = []
    for captured in (None, False, True):
        if captured is not None:
            as_on_an_accelerator(monkeypatch, captured)
        with Operations() as operations:
            solutions.append(solve_capacity(scores, 0.3, k, initial=near))
    for solution in solutions:
        for name in ("potentials", "error", "iterations", "shifts"):
            assert torch.equal(getattr(solution, name), getattr(solutions[0], name)), name
    assert operations.reads == 0, "of the last, in a CUDA graph"


@pytest.mark.parametrize(("warm", "kernels", "reads"), [(True, 1500, 12), (False, 5000, 50)])
def test_on_an_accelerator_a_solve_takes_hundreds_of_kernels_and_not_a_hundred_thousand(
    monkeypatch, warm, kernels, reads
):
    generator = torch.Generator().manual_seed(4)
    leaning_E = torch.randn(64, generator=generator)
    scores, before = (torch.randn(2048, 64, generator=generator) + leaning_E for _ in range(2))
    near = solve_capacity(before, 0.3, 2).potentials if warm else None
    as_on_an_accelerator(monkeypatch)
    with Operations() as operations:
        solution = solve_capacity(scores, 0.3, 2, initial=near)
    solution.check()
    assert operations.counts.total() < kernels
    assert operations.reads < reads


def test_on_an_accelerator_no_rank_leaves_before_the_others(monkeypatch):
    done, looks = torch.tensor(True), []

    def with_one_that_goes_on(going_on):
        looks.append(float(going_on))
        return going_on + 1

    assert ended(done, 0, 2, with_one_that_goes_on) and not looks, "on the CPU the host just reads"
    as_on_an_accelerator(monkeypatch)
    assert not ended(done, 0, 2, with_one_that_goes_on) and not looks
    assert not ended(done, 1, 2, with_one_that_goes_on) and looks == [0.0]
    assert ended(done, 1, 2, lambda going_on: going_on)
    assert not ended(~done, 1, 2, lambda going_on: going_on)


def _solve_my_share(bounds, on_an_accelerator):
    import torch.distributed as dist

    from ssr_deepspeed.collectives import sum_over

    if on_an_accelerator:  # in a process of its own
        ssr_deepspeed.ot.problem.readable = lambda tensor: False
    rank = dist.get_rank()
    mine = slice(bounds[rank], bounds[rank + 1])
    scores, mask = problem("clustered")[mine], (torch.arange(96) % 7 != 0)[mine]
    reduce = sum_over(dist.group.WORLD)
    solution = solve_capacity(scores, 0.1, 2, mask=mask, tolerance=1e-9, max_iterations=100, reduce=reduce)
    return solution.potentials.tolist(), solution.shifts.tolist()


@pytest.mark.parametrize("on_an_accelerator", [False, True])
def test_three_ranks_with_unequal_and_no_tokens_give_one_processs_potentials(tmp_path, on_an_accelerator):
    whole = solve_capacity(
        problem("clustered"), 0.1, 2, mask=torch.arange(96) % 7 != 0, tolerance=1e-9, max_iterations=100
    ).check()
    shares = run_ranks(3, _solve_my_share, [0, 70, 70, 96], on_an_accelerator, folder=tmp_path)
    for potentials, _ in shares:
        torch.testing.assert_close(torch.tensor(potentials, dtype=torch.float64), whole.potentials, rtol=0, atol=1e-10)
    shifts = torch.tensor([shift for _, theirs in shares for shift in theirs], dtype=torch.float64)
    used = torch.arange(96) % 7 != 0
    torch.testing.assert_close(shifts[used], whole.shifts[used], rtol=0, atol=1e-9)


def _spread_rows(k):
    """Rows of spread .1 to 100, then some with nothing near the k-th score; fp32."""
    scores_TE = torch.randn(300, 8) * torch.logspace(-1, 2, 300).unsqueeze(1)
    far_E = torch.where(torch.arange(8) < k, 60.0, -60.0)
    return torch.cat([scores_TE, far_E.expand(5, 8), torch.zeros(5, 8)])


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_rows_keep_the_shift_they_have_found_while_others_go_on(monkeypatch, k, looks):
    """Also where the host looks rarely or never, and all rows go on."""
    as_on_an_accelerator(monkeypatch, captured=not looks)
    scaled_TE = _spread_rows(k)
    shift_T = row_shifts(scaled_TE, k).double()
    sum_T = torch.sigmoid(scaled_TE.double() - shift_T.unsqueeze(1)).sum(1)
    assert (sum_T - k).abs().max() < 1e-4


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (8, 5), (8, 7), (64, 1), (64, 8), (256, 8)])
@pytest.mark.parametrize("spread", [0.03, 0.3, 1.0, 3.0, 30.0, 100.0])
def test_columns_at_given_potentials_are_good_to_a_thousandth(experts, k, spread):
    """The spread of the scores is in units of the entropy; some experts are preferred by all tokens."""
    scores_TE = 0.3 * spread * (torch.randn(1500, experts) + 0.5 * torch.randn(experts))
    potentials_E = 0.3 * spread * torch.randn(experts) / 4
    column_E, shift_T = capacity_columns(scores_TE, 0.3, k, potentials_E)
    scaled_TE = (scores_TE.double() + potentials_E) / 0.3
    exact_T = row_shifts(scaled_TE, k)
    expected_E = torch.sigmoid(scaled_TE - exact_T.unsqueeze(1)).sum(0)
    torch.testing.assert_close(column_E, expected_E, rtol=1e-3, atol=1e-3 * 1500 * k / experts)
    found_TE = torch.sigmoid(scaled_TE - shift_T.double().unsqueeze(1) / 0.3)
    assert (found_TE.sum(1) - k).abs().max() < 0.02 * k
