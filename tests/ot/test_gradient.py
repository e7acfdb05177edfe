import pytest
import torch

from ssr_deepspeed.ot import implicit_potentials, plan, solve, unrolled_potentials
from ssr_deepspeed.routing import route, surviving_weights
from tests.gloo import run_ranks


def potentials_of(scores, entropy, mask=None):
    solved = solve(scores, entropy, mask=mask, tolerance=1e-13, max_iterations=20_000).potentials
    return implicit_potentials(scores, solved, entropy, mask)


@pytest.mark.parametrize("entropy", [1.0, 0.4])
def test_the_potentials_gradient_equals_finite_differences(entropy):
    scores = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: potentials_of(s, entropy), scores, atol=1e-6)


def test_the_gradient_through_the_whole_plan_equals_finite_differences():
    scores = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: plan(s, potentials_of(s, 0.7), 0.7), scores, atol=1e-6)


def test_it_equals_the_unrolled_iterations():
    scores = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 5, dtype=torch.float64)
    (plan(scores, potentials_of(scores, 0.5), 0.5) * weight).sum().backward()
    unrolled = scores.detach().clone().requires_grad_()
    (plan(unrolled, unrolled_potentials(unrolled, 0.5, 400), 0.5) * weight).sum().backward()
    torch.testing.assert_close(scores.grad, unrolled.grad, rtol=1e-7, atol=1e-9)


def test_no_gradient_pushes_a_whole_expert():
    """A constant for each expert cancels in the plan, so each column of the gradient sums to zero."""
    scores = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    (plan(scores, potentials_of(scores, 1.0), 1.0) ** 2 * torch.randn(20, 6)).sum().backward()
    torch.testing.assert_close(scores.grad.sum(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-8)


def test_padding_gets_no_gradient_and_gives_none():
    scores = torch.randn(9, 4, dtype=torch.float64)
    mask = torch.arange(9) % 3 != 0
    weight = torch.randn(4, dtype=torch.float64)
    padded, bare = scores.clone().requires_grad_(), scores[mask].clone().requires_grad_()
    (potentials_of(padded, 1.0, mask) * weight).sum().backward()
    (potentials_of(bare, 1.0) * weight).sum().backward()
    torch.testing.assert_close(padded.grad[mask], bare.grad)
    assert torch.equal(padded.grad[~mask], torch.zeros_like(padded.grad[~mask]))


def test_a_batch_of_padding_alone_gives_a_zero_gradient():
    scores = torch.randn(5, 4, requires_grad=True)
    implicit_potentials(scores, torch.zeros(4), 1.0, torch.zeros(5)).sum().backward()
    assert torch.equal(scores.grad, torch.zeros(5, 4))


def test_unrolled_sweeps_give_the_potentials_and_mask_of_the_solver():
    scores = torch.randn(9, 4, dtype=torch.float64)
    mask = torch.arange(9) % 3 != 0
    solved = solve(scores, 0.7, mask=mask, tolerance=1e-12, max_iterations=2000)
    torch.testing.assert_close(unrolled_potentials(scores, 0.7, 500, mask), solved.potentials, rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gradients_of_the_routing_weights_agree_three_ways(k):
    """Implicit, unrolled and central differences of a loss of the renormalised top-k weights."""
    scores = torch.randn(10, 5, dtype=torch.float64)
    goal = torch.randn(10, k, dtype=torch.float64)

    def loss(scores, potentials):
        routes = route(scores, potentials, k=k, scores=scores, entropy=0.6)
        return (surviving_weights(routes, torch.ones_like(routes.experts_TK, dtype=torch.bool)) * goal).sum()

    implicit, unrolled = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss(implicit, potentials_of(implicit, 0.6)).backward()
    loss(unrolled, unrolled_potentials(unrolled, 0.6, 600)).backward()
    torch.testing.assert_close(implicit.grad, unrolled.grad, rtol=1e-6, atol=1e-9)
    for token, expert in [(0, 0), (3, 2), (9, 4)]:
        step = torch.zeros_like(scores)
        step[token, expert] = 1e-5
        up, down = scores + step, scores - step
        slope = (loss(up, potentials_of(up, 0.6)) - loss(down, potentials_of(down, 0.6))) / 2e-5
        torch.testing.assert_close(implicit.grad[token, expert], slope, rtol=1e-4, atol=1e-7)


def test_partial_keeps_the_direction_and_detach_has_none():
    """Measured cosine of the partial gradient to the exact one on such problems: 0.9 to 1."""
    scores = torch.randn(200, 8, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(200, 2, dtype=torch.float64)

    def gradient(potentials, detach=False):
        routes = route(scores, potentials, k=2, scores=scores, detach=detach)
        weights = surviving_weights(routes, torch.ones_like(routes.experts_TK, dtype=torch.bool))
        return torch.autograd.grad((weights * goal).sum(), scores)[0] if weights.requires_grad else None

    potentials = potentials_of(scores, 1.0)
    exact, partial = gradient(potentials), gradient(potentials.detach())
    assert torch.cosine_similarity(exact.flatten(), partial.flatten(), dim=0) > 0.9
    assert exact.sum(0).abs().max() < 1e-9 < partial.sum(0).abs().max()
    assert gradient(potentials, detach=True) is None


def _gradient_of_my_share(bounds):
    import torch.distributed as dist

    from ssr_deepspeed.collectives import sum_over

    reduce = sum_over(dist.group.WORLD)
    mine = slice(bounds[dist.get_rank()], bounds[dist.get_rank() + 1])
    scores, weight, mask = (tensor[mine] for tensor in shared_problem())
    scores.requires_grad_()
    solved = solve(scores, 0.5, mask=mask, tolerance=1e-12, max_iterations=5000, reduce=reduce).potentials
    potentials = implicit_potentials(scores, solved, 0.5, mask, reduce)
    (plan(scores, potentials, 0.5) * weight).sum().backward()
    return scores.grad.tolist()


def shared_problem():
    generator = torch.Generator().manual_seed(5)
    scores, weight = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    return scores, weight, torch.arange(30) % 4 != 0


def test_three_ranks_with_unequal_and_no_tokens_give_one_processs_gradient(tmp_path):
    scores, weight, mask = shared_problem()
    scores.requires_grad_()
    (plan(scores, potentials_of(scores, 0.5, mask), 0.5) * weight).sum().backward()
    shares = run_ranks(3, _gradient_of_my_share, [0, 21, 21, 30], folder=tmp_path)
    together = torch.tensor([row for theirs in shares for row in theirs], dtype=torch.float64)
    torch.testing.assert_close(together, scores.grad, rtol=0, atol=1e-9)


def test_autocast_around_the_backward_pass_changes_nothing():
    scores = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(8)
    potentials = solve(scores, 1.0).potentials
    (expected,) = torch.autograd.grad((implicit_potentials(scores, potentials, 1.0) * weight).sum(), scores)
    loss = (implicit_potentials(scores, potentials, 1.0) * weight).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(loss, scores)
    assert torch.equal(got, expected)


def test_second_derivatives_are_refused():
    scores = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(potentials_of(scores, 1.0).square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_an_expert_out_of_every_tokens_reach_leaves_the_gradient_finite():
    scores = torch.randn(20, 4, dtype=torch.float64)
    scores[:, 2] -= 1e4
    scores.requires_grad_()
    implicit_potentials(scores, torch.zeros(4, dtype=torch.float64), 1.0).square().sum().backward()
    implicit_potentials(scores, torch.zeros(4, dtype=torch.float64), 1.0)[2].backward()
    assert torch.isfinite(scores.grad).all()
