import math

import numpy
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import ssr_deepspeed.ot.problem as problem_module
import ssr_deepspeed.ot.sinkhorn as sinkhorn
import ssr_deepspeed.ot.solver as solver
from ssr_deepspeed.ot import plan, solve
from tests.gloo import run_ranks
from tests.ot.problems import KINDS, Operations, problem

METHODS = ["sinkhorn", "newton", "sns", "adaptive"]
every_method = pytest.mark.parametrize("method", METHODS)


def read_nothing(monkeypatch):
    """Make the solvers treat CPU tensors as those of a device."""
    for module in (sinkhorn, problem_module, solver):
        monkeypatch.setattr(module, "readable", lambda tensor: False)


def spread(scores):
    return float((scores.amax(1) - scores.amin(1)).max())


@pytest.mark.parametrize("entropy", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_equals_an_independent_solvers(kind, entropy):
    scores = problem(kind)
    if spread(scores) / entropy > 50:
        scores = scores * 50 * entropy / spread(scores)
    tokens, experts = scores.shape
    expected = ot.bregman.sinkhorn_log(
        numpy.ones(tokens),
        numpy.full(experts, tokens / experts),
        -scores.numpy(),
        entropy,
        numItermax=200_000,
        stopThr=1e-13,
    )
    for method in METHODS:
        cap = 50_000 if method in ("sinkhorn", "adaptive") else 300
        solution = solve(scores, entropy, method=method, tolerance=1e-11, max_iterations=cap).check()
        dense = plan(scores, solution.potentials, entropy)
        torch.testing.assert_close(dense, torch.from_numpy(expected), rtol=0, atol=1e-9)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores_are_solved_in_fp32(method, dtype):
    scores = problem("clustered").to(dtype)
    solution = solve(scores, 0.5, method=method, tolerance=1e-4, max_iterations=200).check()
    exact = solve(scores.double(), 0.5, tolerance=1e-10, max_iterations=2000).check()
    assert solution.potentials.dtype == torch.float32
    torch.testing.assert_close(solution.potentials.double(), exact.potentials, rtol=0, atol=5e-4)


@every_method
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6, 1e30, 1e37])
def test_extreme_scores_stay_finite_and_the_result_is_truthful(method, scale):
    scores = torch.randn(64, 8) * scale
    solution = solve(scores, 1.0, method=method, max_iterations=40)
    assert torch.isfinite(solution.potentials).all()
    dense = plan(scores.double(), solution.potentials.double(), 1.0)
    torch.testing.assert_close(dense.sum(1), torch.ones(64, dtype=torch.float64))
    # Hardly any such problem is solved in 40 iterations: the error must say so.
    assert math.isfinite(float(solution.error))
    # Beyond 1e6 the last digit of a score in fp32 is more than a unit of entropy.
    if scale <= 1e4:
        error = (dense.sum(0) / 8 - 1).abs().max()
        assert float(solution.error) == pytest.approx(float(error), rel=0.02)
    assert bool(solution.result) == (float((dense.sum(0) / 8 - 1).abs().max()) > 1e-3)


@pytest.mark.parametrize("tokens", [2048, 96])
@pytest.mark.parametrize("kind", ["random", "collapsed", "clustered", "one-hot"])
def test_newton_needs_few_steps_at_any_entropy(kind, tokens):
    scores = problem(kind, tokens, 16)
    for entropy in (1.0, 0.1, 0.01):
        solution = solve(scores, entropy, method="newton", tolerance=1e-9, max_iterations=40).check()
        assert int(solution.iterations) <= 25


def test_newton_steps_reach_what_thousands_of_sweeps_do_not():
    scores = problem("clustered", 512, 16)
    assert solve(scores, 0.01, method="sinkhorn", tolerance=1e-6, max_iterations=1000).result
    solve(scores, 0.01, method="newton", tolerance=1e-6, max_iterations=50).check()
    solve(scores, 0.01, method="adaptive", tolerance=1e-6, max_iterations=50).check()


def test_adaptive_leaves_newton_out_where_sweeps_are_enough(monkeypatch):
    monkeypatch.setattr("ssr_deepspeed.ot.solver.newton", None)
    solution = solve(problem("random"), 1.0, method="adaptive").check()
    torch.testing.assert_close(solution.potentials, solve(problem("random"), 1.0, method="sinkhorn").potentials)


@every_method
def test_a_solution_that_did_not_converge_says_so(method):
    solution = solve(problem("collapsed"), 0.01, method=method, max_iterations=2)
    with pytest.raises(RuntimeError, match=r"after \d iterations.*raise max_iterations"):
        solution.check()
    dense = plan(problem("collapsed"), solution.potentials, 0.01)
    assert float(solution.error) == pytest.approx(float((dense.sum(0) / 12 - 1).abs().max()), rel=1e-6)


@given(
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    entropy=st.floats(0.3, 3),
    shift=st.floats(-50, 50),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_marginals_shift_invariance_and_zero_mean_hold(method, seed, tokens, experts, entropy, shift):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    settings = {"method": method, "tolerance": 1e-9, "max_iterations": 5000}
    solution = solve(scores, entropy, **settings).check()
    dense = plan(scores, solution.potentials, entropy)
    torch.testing.assert_close(
        dense.sum(0), torch.full((experts,), tokens / experts, dtype=torch.float64), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(dense.sum(1), torch.ones(tokens, dtype=torch.float64))
    assert abs(float(solution.potentials.mean())) < 1e-10
    # A constant for each token cancels; a constant for each expert moves into the potentials.
    by_row = scores + shift * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    again = solve(by_row, entropy, **settings)
    torch.testing.assert_close(again.potentials, solution.potentials, rtol=0, atol=1e-6)
    offset = torch.randn(experts, generator=generator, dtype=torch.float64)
    moved = solve(scores + offset, entropy, **settings).check()
    torch.testing.assert_close(moved.potentials + offset - offset.mean(), solution.potentials, rtol=0, atol=1e-6)


@every_method
def test_padding_takes_no_part(method):
    scores = problem("clustered")
    mask = torch.rand(len(scores)) < 0.6
    padded = torch.where(mask.unsqueeze(1), scores, 1e3 * torch.randn_like(scores))
    settings = {"method": method, "tolerance": 1e-10, "max_iterations": 2000}
    expected = solve(scores[mask], 1.0, **settings)
    for form in (mask, mask.int(), mask.float(), mask.reshape(4, -1)):
        torch.testing.assert_close(solve(padded, 1.0, mask=form, **settings).potentials, expected.potentials)


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_does_not_spoil_the_others(method, bad):
    scores = problem("random")
    expected = solve(scores[1:], 1.0, method=method)
    scores[0, 2] = bad
    torch.testing.assert_close(solve(scores, 1.0, method=method).potentials, expected.potentials)


@every_method
@pytest.mark.parametrize("rows", [0, 5])
def test_no_token_at_all_gives_zero_potentials(method, rows):
    solution = solve(torch.randn(rows, 4), 1.0, method=method, mask=torch.zeros(rows)).check()
    assert torch.equal(solution.potentials, torch.zeros(4))


@every_method
def test_a_warm_start_at_the_solution_needs_no_iteration(method):
    scores = problem("clustered")
    first = solve(scores, 1.0, method=method, tolerance=1e-6, max_iterations=1000)
    second = solve(scores, 1.0, method=method, tolerance=1e-5, max_iterations=1000, initial=first.potentials)
    assert int(first.iterations) > 3
    assert int(second.iterations) == 0


@pytest.mark.parametrize("method", ["sinkhorn", "newton", "sns"])
@pytest.mark.parametrize("entropy", [1.0, 0.3])
def test_stopping_early_and_running_to_the_cap_give_the_same(method, entropy, monkeypatch):
    scores = problem("clustered")
    early = solve(scores, entropy, method=method, max_iterations=200)
    read_nothing(monkeypatch)
    full = solve(scores, entropy, method=method, max_iterations=200)
    torch.testing.assert_close(early.potentials, full.potentials, rtol=0, atol=1e-10)
    torch.testing.assert_close(early.error, full.error, rtol=1e-6, atol=1e-12)
    assert int(early.iterations) == int(full.iterations) < 200


@pytest.mark.parametrize(("method", "most"), [("sinkhorn", 0.5), ("newton", 0.2), ("adaptive", 0.4)])
def test_a_rare_solve_on_an_accelerator_leaves_out_most_of_what_changes_nothing(method, most, monkeypatch):
    scores = problem("clustered")
    early = solve(scores, 1.0, method=method)
    read_nothing(monkeypatch)
    with Operations() as whole:
        full = solve(scores, 1.0, method=method)
    with Operations() as operations:
        rare = solve(scores, 1.0, method=method, rare=True)
    assert not whole.reads and 0 < operations.reads < 10
    assert operations.counts.total() < most * whole.counts.total()
    for solution in (full, early) if method != "adaptive" else (full,):
        assert int(rare.iterations) == int(solution.iterations)
    torch.testing.assert_close(rare.potentials, full.potentials, rtol=0, atol=0)
    torch.testing.assert_close(rare.error, full.error, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [1, 100])
def test_adaptive_off_the_cpu_converges_at_any_scale(scale, monkeypatch):
    read_nothing(monkeypatch)
    for entropy in (1.0, 0.05):
        solve(scale * problem("clustered", 512, 16), scale * entropy, method="adaptive").check()
    solve(scale * problem("clustered", 512, 16), 1.0, method="adaptive").check()


@every_method
def test_the_default_device_plays_no_part(method):
    scores = problem("clustered")
    expected = solve(scores, 0.3, method=method, reduce=lambda tensor: tensor.clone())
    with torch.device("meta"):
        found = solve(scores, 0.3, method=method, reduce=lambda tensor: tensor.clone())
    assert torch.equal(found.potentials, expected.potentials)


def test_adaptive_leaves_newton_out_where_its_systems_are_too_large(monkeypatch):
    monkeypatch.setattr(solver, "_MOST_EXPERTS", 7)
    monkeypatch.setattr(solver, "newton", None)
    assert int(solve(problem("clustered"), 0.3, method="adaptive", max_iterations=100).check().iterations) > 16


@every_method
def test_a_warm_start_may_be_far_off_or_shifted(method):
    """An offset costs no digits, and potentials beyond the exponentials' range do not spoil the sums."""
    scores = problem("clustered").float()
    offset = torch.zeros(8) + 1e9
    same = solve(scores, 1.0, method=method, initial=offset)
    torch.testing.assert_close(same.potentials, solve(scores, 1.0, method=method).potentials)
    far = torch.zeros(8)
    far[3] = 300.0
    for cap in (0, 500):
        solution = solve(scores, 1.0, method=method, initial=far, max_iterations=cap)
        dense = plan(scores.double(), solution.potentials.double(), 1.0)
        error = (dense.sum(0) / 12 - 1).abs().max()
        assert float(solution.error) == pytest.approx(float(error), rel=1e-3, abs=1e-5)
        assert bool(solution.converged) == (cap == 500)


@every_method
def test_an_expert_far_below_what_exponentials_reach_is_balanced_all_the_same(method):
    scores = problem("random").float()
    scores[:, 2] -= 150
    solve(scores, 1.0, method=method, max_iterations=60).check()


@every_method
def test_the_engines_autocast_changes_nothing(method):
    scores = problem("clustered").float()
    expected = solve(scores, 0.3, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(solve(scores, 0.3, method=method).potentials, expected.potentials)


def test_newton_returns_nothing_worse_than_its_start():
    scores = problem("clustered", 512, 16)
    near = solve(scores, 0.05, method="newton").potentials + 0.05 * torch.randn(16)
    start = float(solve(scores, 0.05, method="newton", initial=near, max_iterations=0).error)
    for cap in (1, 2, 4, 6, 8):
        assert float(solve(scores, 0.05, method="newton", initial=near, max_iterations=cap).error) <= start


def test_newton_gets_through_groups_of_experts_that_no_token_joins():
    scores = problem("one-hot", 96, 8)
    solution = solve(scores, 0.01, method="newton", tolerance=1e-9, max_iterations=40).check()
    assert int(solution.iterations) <= 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_of_the_column_sums_are_one(dtype, monkeypatch):
    """Matrix-vector products with the exponentials, and log-domain rows."""
    scores = problem("clustered").to(dtype)
    quick = solve(scores, 0.5, tolerance=1e-5, max_iterations=100)
    monkeypatch.setattr("ssr_deepspeed.ot.sinkhorn.readable", lambda tensor: False)
    logs = solve(scores, 0.5, tolerance=1e-5, max_iterations=100)
    torch.testing.assert_close(
        quick.potentials, logs.potentials, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


@every_method
def test_nothing_is_read_from_the_device(method):
    with FakeTensorMode():
        solution = solve(torch.randn(32, 8), 1.0, method=method, mask=torch.ones(32))
        assert solution.potentials.shape == (8,)


@every_method
def test_arguments_are_left_alone(method):
    scores = problem("random")
    before, initial = scores.clone(), torch.zeros(8)
    solve(scores, 1.0, method=method, initial=initial)
    assert torch.equal(scores, before)
    assert torch.equal(initial, torch.zeros(8))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: solve(torch.zeros(3), 1.0), r"\(3,\)"),
        (lambda: solve(torch.zeros(3, 2), 0.0), "entropy = 0.0"),
        (lambda: solve(torch.zeros(3, 2), math.inf), "entropy = inf"),
        (lambda: solve(torch.zeros(3, 2), 1.0, initial=torch.zeros(1)), r"initial must have shape \(2,\), got \(1,\)"),
        (lambda: solve(torch.zeros(3, 2), 1.0, mask=torch.ones(4)), "4 entries for 3 tokens"),
        (lambda: solve(torch.zeros(3, 2), 1.0, method="newtn"), "method = 'newtn'; allowed: .*'newton'"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def shared_problem(wild):
    """Scores for three ranks; wild ones leave the range of cheap sweeps on the last rank alone."""
    scores = problem("clustered")
    return torch.cat([scores[:80], scores[80:] * 200]) if wild else scores


def _solve_my_share(method, bounds, wild=False):
    import torch.distributed as dist

    from ssr_deepspeed.collectives import sum_over

    scores, mask = shared_problem(wild), torch.arange(96) % 7 != 0
    rank = dist.get_rank()
    mine = slice(bounds[rank], bounds[rank + 1])
    calls = []
    reduce = sum_over(dist.group.WORLD)

    def counted(tensor):
        calls.append(tensor.numel())
        return reduce(tensor)

    solution = solve(
        scores[mine], 0.3, method=method, mask=mask[mine], tolerance=1e-9, max_iterations=3000, reduce=counted
    )
    return solution.potentials.tolist(), int(solution.iterations), calls


@pytest.mark.parametrize("method", ["sinkhorn", "newton", "sns"])
def test_three_ranks_with_unequal_and_no_tokens_give_one_processs_potentials(method, tmp_path):
    settings = {"method": method, "tolerance": 1e-9, "max_iterations": 3000}
    whole = solve(problem("clustered"), 0.3, mask=torch.arange(96) % 7 != 0, **settings)
    for potentials, iterations, calls in run_ranks(3, _solve_my_share, method, [0, 70, 70, 96], folder=tmp_path):
        torch.testing.assert_close(torch.tensor(potentials, dtype=torch.float64), whole.potentials, rtol=0, atol=1e-11)
        assert iterations == int(whole.iterations)
        # The token count, and with Newton the scores' spread; then one collective for each evaluation.
        assert set(calls) == {"sinkhorn": {1, 8}, "newton": {1, 1 + 8 + 36}, "sns": {1, 8, 1 + 8 + 36}}[method]
        assert calls.count(1) == (1 if method == "sinkhorn" else 2)
        assert len(calls) <= iterations + 8


@pytest.mark.parametrize("wild", [False, True])
def test_ranks_with_scores_of_different_spread_take_the_same_way(wild, tmp_path):
    mask = torch.arange(96) % 7 != 0
    whole = solve(shared_problem(wild), 0.3, method="adaptive", mask=mask, tolerance=1e-9, max_iterations=3000)
    shares = run_ranks(3, _solve_my_share, "adaptive", [0, 70, 70, 96], wild, folder=tmp_path)
    for potentials, iterations, calls in shares:
        torch.testing.assert_close(torch.tensor(potentials, dtype=torch.float64), whole.potentials, rtol=0, atol=1e-7)
        assert iterations == int(whole.iterations)
        assert calls == shares[0][2]
