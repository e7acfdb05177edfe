import itertools

import pytest
import torch
from deepspeed.moe.sharded_moe import _capacity

from ssr_deepspeed.routing import expert_capacity, fill_slots, route, surviving_weights


def test_the_capacity_is_deepspeeds_for_every_size():
    for tokens, experts, k, factor, least in itertools.product(
        (1, 7, 10, 64, 1000), (1, 3, 8, 64), (1, 2, 3), (0.5, 1.0, 1.1, 1.2, 1.25, 2.0), (0, 4, 8)
    ):
        host = _capacity(torch.empty(tokens, experts), torch.tensor(factor * k), torch.tensor(least))
        assert expert_capacity(tokens, experts, k, factor, least) == int(host)


def test_the_capacity_is_rounded_up_to_the_tensor_parallel_size():
    assert expert_capacity(10, 4, 1, 1.0, 0) == 3
    assert expert_capacity(10, 4, 1, 1.0, 0, multiple=4) == 4
    assert expert_capacity(16, 4, 1, 1.0, 0, multiple=4) == 4


@pytest.mark.parametrize("capacity", [1, 5, 12, None])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_full_expert_keeps_its_most_probable_routes_in_slots_of_their_own(capacity, k):
    logits = torch.randn(40, 4) * 3 + torch.tensor([2.0, 0, 0, -2])
    routes = route(logits, k=k)
    slots = fill_slots(routes, capacity)
    for expert in range(4):
        here = routes.experts_TK == expert
        kept = here & slots.kept_TK
        room = min(int(routes.demand_E[expert]), capacity or 40)
        assert int(kept.sum()) == room
        assert sorted(slots.locations_TK[kept].tolist()) == list(range(room))
        lost = routes.log_mass_TK[here & ~slots.kept_TK]
        if len(lost):
            assert lost.max() <= routes.log_mass_TK[kept].min()


def test_a_route_whose_probability_underflows_still_gets_a_free_slot():
    logits = torch.tensor([[0.0, -500.0, -900.0]]).repeat(6, 1)
    slots = fill_slots(route(logits, k=2), 5)
    assert slots.kept_TK.sum(0).tolist() == [5, 5]


def test_weights_of_surviving_routes_sum_to_one():
    routes = route(torch.randn(40, 4) + torch.tensor([3.0, 0, 0, 0]), k=2)
    kept = fill_slots(routes, 12).kept_TK
    total = surviving_weights(routes, kept).sum(1)
    torch.testing.assert_close(total, kept.any(1).float())
    assert int((~kept.any(1)).sum()) + int((kept.sum(1) == 1).sum()) > 0
