import itertools

import pytest
import torch

from ssr_deepspeed.ot import plan, solve
from ssr_deepspeed.routing import compatibility, fill_slots, route, surviving_weights


def weights_of(routes):
    return surviving_weights(routes, fill_slots(routes, None).kept_TK)


def dense(experts_TK, weights_TK, experts):
    return torch.zeros(len(experts_TK), experts, dtype=weights_TK.dtype).scatter(1, experts_TK, weights_TK)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("k", [2, 3, 6])
def test_a_transport_step_takes_the_plans_top_k_and_renormalises_it(cost, k):
    logits = torch.randn(50, 6, dtype=torch.float64)
    scores = compatibility(logits, cost)
    potentials = solve(scores, 0.4, max_iterations=500).potentials
    routes = route(logits, potentials, k=k, scores=scores, entropy=0.4)
    top = torch.topk(plan(scores, potentials, 0.4), k)
    assert torch.equal(routes.experts_TK, top.indices)
    torch.testing.assert_close(weights_of(routes), top.values / top.values.sum(1, keepdim=True))


def test_ssr_l_at_entropy_one_and_zero_potentials_is_the_softmax_gate():
    logits = torch.randn(40, 8)
    plain, transport = route(logits, k=2), route(logits, torch.zeros(8), k=2, entropy=1.0)
    assert torch.equal(plain.experts_TK, transport.experts_TK)
    torch.testing.assert_close(weights_of(plain), weights_of(transport))


def test_row_potentials_cancel():
    logits, potentials = torch.randn(40, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    one = route(logits, potentials, k=3, entropy=0.3)
    other = route(logits + torch.randn(40, 1, dtype=torch.float64), potentials + 5.0, k=3, entropy=0.3)
    assert torch.equal(one.experts_TK, other.experts_TK)
    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=0, atol=1e-13)


def test_renormalised_top_k_is_the_nearest_k_sparse_distribution():
    """KL(alpha || P_i) over all supports of k experts, by brute force (ALGORITHMS: KL projection)."""
    logits = torch.randn(1, 5, dtype=torch.float64)
    p = torch.softmax(logits, 1)[0]
    chosen = dense(*(lambda r: (r.experts_TK, weights_of(r)))(route(logits, k=2)), 5)[0]

    def divergence(alpha):
        return float(torch.special.xlogy(alpha, alpha).sum() - torch.special.xlogy(alpha, p).sum())

    best = divergence(chosen)
    assert best == pytest.approx(-float(torch.log(p.topk(2).values.sum())))
    for pair in itertools.combinations(range(5), 2):
        for share in torch.linspace(0, 1, 51, dtype=torch.float64):
            alpha = torch.zeros(5, dtype=torch.float64)
            alpha[list(pair)] = torch.stack([share, 1 - share])
            assert divergence(alpha) >= best - 1e-12


@pytest.mark.parametrize("potentials", [None, torch.tensor([3.0, 0.0, -3.0, 0.0])])
def test_one_expert_a_token_has_its_softmax_probability_on_both_kinds_of_step(potentials):
    logits = torch.randn(30, 4, requires_grad=True)
    routes = route(logits, potentials, k=1, entropy=0.5, detach=True)
    weight = weights_of(routes)
    torch.testing.assert_close(weight, torch.softmax(logits, 1).gather(1, routes.experts_TK))
    weight.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_all_experts_are_taken_when_k_is_their_number():
    routes = route(torch.randn(9, 4), torch.randn(4), k=4)
    assert torch.equal(routes.experts_TK.sort(1).values, torch.arange(4).expand(9, 4))
    assert torch.equal(routes.demand_E, torch.full((4,), 9))


@pytest.mark.parametrize("k", [0, 5])
def test_an_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} experts a token out of 4; allowed: 1 to 4"):
        route(torch.randn(9, 4), k=k)


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_is_that_of_the_renormalised_plan_or_none(detach):
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    potentials, weight = torch.randn(6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    routes = route(logits, potentials, k=3, entropy=0.7, detach=detach)
    result = weights_of(routes)
    if detach:
        assert not result.requires_grad
        return
    (result * weight.gather(1, routes.experts_TK)).sum().backward()
    again = logits.detach().clone().requires_grad_()
    top = torch.topk(plan(again, potentials, 0.7), 3)
    (top.values / top.values.sum(1, keepdim=True) * weight.gather(1, top.indices)).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_of_the_plans_size_is_kept_for_the_backward_pass(k):
    logits = torch.randn(512, 64, requires_grad=True)
    sizes = []

    def pack(tensor):
        if tensor.data_ptr() != logits.data_ptr():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weights_of(route(logits, torch.randn(64), k=k, entropy=0.5)).sum()
    assert 0 < max(sizes) <= 512 * 2


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("form", [torch.bool, torch.int32, torch.float32])
def test_padding_is_neither_routed_nor_counted(k, form):
    logits = torch.randn(24, 4)
    used = torch.arange(24) % 3 != 0
    routes = route(logits, k=k, mask=used.to(form).reshape(4, 6))
    bare = route(logits[used], k=k)
    assert torch.equal(routes.demand_E, bare.demand_E)
    slots, bare_slots = fill_slots(routes, 5), fill_slots(bare, 5)
    assert not slots.kept_TK[~used].any()
    assert torch.equal(slots.kept_TK[used], bare_slots.kept_TK)
    torch.testing.assert_close(surviving_weights(routes, slots.kept_TK)[~used], torch.zeros(8, k))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="used_token has 5 entries for 6 tokens"):
        route(torch.randn(6, 4), k=2, mask=torch.ones(5))
