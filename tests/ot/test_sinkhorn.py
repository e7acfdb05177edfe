import math

import numpy
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ssr_deepspeed.ot import plan, solve
from tests.gloo import run_ranks


def inputs(kind, tokens=96, experts=8):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return {
        "random": noise,
        "collapsed": noise + 10.0 * torch.arange(experts) / experts,
        "clustered": torch.randn(4, experts, generator=generator, dtype=torch.float64)[torch.arange(tokens) % 4] * 3
        + 0.05 * noise,
        "one-hot": 20.0 * torch.eye(experts, dtype=torch.float64)[torch.arange(tokens) % 3],
        "constant": torch.zeros(tokens, experts, dtype=torch.float64),
        "one expert": noise[:, :1],
        "fewer tokens than experts": noise[:3],
    }[kind]


KINDS = ["random", "collapsed", "clustered", "one-hot", "constant", "one expert", "fewer tokens than experts"]


@pytest.mark.parametrize("entropy", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_equals_an_independent_solvers(kind, entropy):
    scores = inputs(kind)
    tokens, experts = scores.shape
    solution = solve(scores, entropy, tolerance=1e-12, max_iterations=20_000).check()
    expected = ot.bregman.sinkhorn_log(
        numpy.ones(tokens),
        numpy.full(experts, tokens / experts),
        -scores.numpy(),
        entropy,
        numItermax=100_000,
        stopThr=1e-13,
    )
    torch.testing.assert_close(
        plan(scores, solution.potentials, entropy), torch.from_numpy(expected), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores_are_solved_in_fp32(dtype):
    scores = inputs("clustered").to(dtype)
    solution = solve(scores, 0.5, max_iterations=200).check()
    exact = solve(scores.double(), 0.5, tolerance=1e-10, max_iterations=2000).check()
    assert solution.potentials.dtype == torch.float32
    torch.testing.assert_close(solution.potentials.double(), exact.potentials, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_extreme_scores_stay_finite_and_the_result_is_truthful(scale):
    scores = torch.randn(64, 8) * scale
    solution = solve(scores, 1.0, max_iterations=30)
    assert torch.isfinite(solution.potentials).all()
    dense = plan(scores.double(), solution.potentials.double(), 1.0)
    torch.testing.assert_close(dense.sum(1), torch.ones(64, dtype=torch.float64))
    error = (dense.sum(0) / 8 - 1).abs().max()
    assert float(solution.error) == pytest.approx(float(error), rel=0.02)
    assert bool(solution.result) == (float(solution.error) > solution.tolerance)


def test_a_solution_that_did_not_converge_says_so():
    solution = solve(inputs("collapsed"), 0.01, max_iterations=2)
    with pytest.raises(RuntimeError, match=r"after 2 sweeps.*raise max_iterations"):
        solution.check()


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    entropy=st.floats(0.3, 3),
    shift=st.floats(-50, 50),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_marginals_shift_invariance_and_zero_mean_hold(seed, tokens, experts, entropy, shift):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    solution = solve(scores, entropy, tolerance=1e-9, max_iterations=5000).check()
    dense = plan(scores, solution.potentials, entropy)
    torch.testing.assert_close(
        dense.sum(0), torch.full((experts,), tokens / experts, dtype=torch.float64), rtol=1e-8, atol=0
    )
    assert abs(float(solution.potentials.mean())) < 1e-10
    # A constant for each token cancels; a constant for each expert moves into the potentials.
    by_row = scores + shift * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    again = solve(by_row, entropy, tolerance=1e-9, max_iterations=5000)
    torch.testing.assert_close(again.potentials, solution.potentials, rtol=0, atol=1e-6)


def test_padding_takes_no_part():
    scores = inputs("clustered")
    mask = torch.rand(len(scores)) < 0.6
    padded = torch.where(mask.unsqueeze(1), scores, 1e3 * torch.randn_like(scores))
    for form in (mask, mask.int(), mask.float(), mask.reshape(4, -1)):
        expected = solve(scores[mask], 1.0, tolerance=1e-10, max_iterations=2000)
        torch.testing.assert_close(
            solve(padded, 1.0, mask=form, tolerance=1e-10, max_iterations=2000).potentials, expected.potentials
        )


def test_a_token_with_a_nan_does_not_spoil_the_others():
    scores = inputs("random")
    expected = solve(scores[1:], 1.0)
    scores[0, 2] = math.nan
    torch.testing.assert_close(solve(scores, 1.0).potentials, expected.potentials)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_token_at_all_gives_zero_potentials(rows):
    solution = solve(torch.randn(rows, 4), 1.0, mask=torch.zeros(rows))
    assert torch.equal(solution.potentials, torch.zeros(4))


def test_a_warm_start_at_the_solution_needs_no_sweep():
    scores = inputs("clustered")
    first = solve(scores, 1.0, tolerance=1e-6, max_iterations=1000)
    second = solve(scores, 1.0, tolerance=1e-5, max_iterations=1000, initial=first.potentials)
    assert int(first.iterations) > 3
    assert int(second.iterations) == 0


def test_stopping_early_and_running_to_the_cap_give_the_same(monkeypatch):
    scores = inputs("clustered").float()
    early = solve(scores, 1.0)
    monkeypatch.setattr("ssr_deepspeed.ot.sinkhorn.readable", lambda tensor: False)
    full = solve(scores, 1.0)
    assert torch.equal(early.potentials, full.potentials)
    assert int(early.iterations) == int(full.iterations) < 50


def test_nothing_is_read_from_the_device():
    with FakeTensorMode():
        solution = solve(torch.randn(32, 8), 1.0, mask=torch.ones(32))
        assert solution.potentials.shape == (8,)


def test_arguments_are_left_alone():
    scores = inputs("random")
    before = scores.clone()
    solve(scores, 1.0, initial=torch.zeros(8))
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: solve(torch.zeros(3), 1.0), r"\(3,\)"),
        (lambda: solve(torch.zeros(3, 2), 0.0), "entropy = 0.0"),
        (lambda: solve(torch.zeros(3, 2), 1.0, mask=torch.ones(4)), "4 entries for 3 tokens"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _solve_my_share(bounds):
    import torch.distributed as dist

    from ssr_deepspeed.collectives import sum_over

    scores, mask = inputs("clustered"), torch.arange(96) % 7 != 0
    rank = dist.get_rank()
    mine = slice(bounds[rank], bounds[rank + 1])
    solution = solve(
        scores[mine], 0.3, mask=mask[mine], tolerance=1e-9, max_iterations=3000, reduce=sum_over(dist.group.WORLD)
    )
    return solution.potentials.tolist(), int(solution.iterations)


def test_three_ranks_with_unequal_and_no_tokens_give_one_processs_potentials(tmp_path):
    whole = solve(inputs("clustered"), 0.3, mask=torch.arange(96) % 7 != 0, tolerance=1e-9, max_iterations=3000)
    for potentials, iterations in run_ranks(3, _solve_my_share, [0, 70, 70, 96], folder=tmp_path):
        torch.testing.assert_close(torch.tensor(potentials, dtype=torch.float64), whole.potentials, rtol=0, atol=1e-12)
        assert iterations == int(whole.iterations)
