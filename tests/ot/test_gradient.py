import pytest
import torch

from ssr_deepspeed.ot import implicit_potentials, plan, solve


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
    potential = torch.zeros(5, dtype=torch.float64)
    for _ in range(400):
        columns = torch.softmax((unrolled + potential) / 0.5, dim=1).sum(0)
        potential = potential + 0.5 * (torch.log(torch.tensor(12 / 5)) - columns.log())
    (plan(unrolled, potential, 0.5) * weight).sum().backward()
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
