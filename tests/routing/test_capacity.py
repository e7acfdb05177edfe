import itertools
import math
from collections import defaultdict

import pytest
import torch
from deepspeed.moe.sharded_moe import _capacity
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 5),
    choices=st.integers(1, 5),
    capacity=st.none() | st.integers(1, 13),
    levels=st.integers(1, 4),
    padded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_slots_go_by_mass_then_by_index_and_never_to_padding(tokens, experts, choices, capacity, levels, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct scores make ties.
    scores = torch.randint(0, levels, (tokens, experts), generator=generator).float()
    mask = torch.rand(tokens, generator=generator) < 0.7 if padded else None
    routes = route(scores, k=min(choices, experts), mask=mask)
    slots = fill_slots(routes, capacity)
    by_expert = defaultdict(list)
    for index, (expert, mass) in enumerate(zip(routes.experts_TK.flatten(), routes.log_mass_TK.flatten(), strict=True)):
        if mask is None or mask[index // routes.experts_TK.shape[1]]:
            by_expert[int(expert)].append((-float(mass), index))
    kept = {index for asked in by_expert.values() for _, index in sorted(asked)[:capacity]}
    assert set(slots.kept_TK.flatten().nonzero().flatten().tolist()) == kept
    for expert, asked in by_expert.items():
        taken = slots.locations_TK[(routes.experts_TK == expert) & slots.kept_TK].tolist()
        assert len(set(taken)) == len(taken)
        assert all(0 <= slot < (len(asked) if capacity is None else capacity) for slot in taken)


@pytest.mark.parametrize("bad", [math.nan, -math.nan])
def test_a_nan_mass_takes_no_slot_from_a_number_and_none_out_of_range(bad):
    routes = route(torch.tensor([[0.0, -500.0]]).repeat(6, 1), k=1)
    routes.log_mass_TK[[0, 3]] = bad
    routes.log_mass_TK[1] = -math.inf
    slots = fill_slots(routes, 4)
    assert slots.kept_TK.flatten().tolist() == [False, True, True, False, True, True]
    slots = fill_slots(routes, 5)
    assert slots.kept_TK.flatten().tolist() == [True, True, True, False, True, True]
    assert sorted(slots.locations_TK[slots.kept_TK].tolist()) == list(range(5))


def test_weights_of_surviving_routes_sum_to_one():
    routes = route(torch.randn(40, 4) + torch.tensor([3.0, 0, 0, 0]), k=2)
    kept = fill_slots(routes, 12).kept_TK
    total = surviving_weights(routes, kept).sum(1)
    torch.testing.assert_close(total, kept.any(1).float())
    assert int((~kept.any(1)).sum()) + int((kept.sum(1) == 1).sum()) > 0
