"""What the study measures, against counts worked out by hand."""

import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch.utils.checkpoint import checkpoint

from benchmarks.study.measure import (
    GateWatch,
    Passes,
    count_by_source,
    dead_experts,
    mutual_information,
    training_balance,
    would_be_drop,
)
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate


def _passes(demand_LE, dispatched_L):
    return Passes(torch.tensor(demand_LE).double(), torch.tensor(dispatched_L).double(), 0.0)


def test_an_expert_below_a_hundredth_of_the_mean_is_dead():
    assert dead_experts(torch.tensor([[100.0, 100, 100, 0], [100, 100, 98, 1]])).tolist() == [1, 0]


def test_the_would_be_drop_counts_what_exceeds_the_slots_of_each_step():
    # Means 4 and 2: slots 4 and 2 at factor 1, 5 and 3 at 1.25.
    demand_WLE = torch.tensor([[[9, 3, 4, 0]], [[3, 2, 2, 1]]])
    assert would_be_drop(demand_WLE, 1.0).tolist() == [6 / 24]
    assert would_be_drop(demand_WLE, 1.25).tolist() == [4 / 24]


def test_routes_are_counted_by_source_without_those_that_found_no_slot():
    routes_KT = torch.tensor([[0, 1, 2], [1, -1, 0]], dtype=torch.int32)
    assert count_by_source(routes_KT, torch.tensor([0, 1, 1]), 2, 3).tolist() == [[1, 1, 0], [1, 1, 1]]


def test_mutual_information_is_zero_for_independent_and_the_entropy_for_determined_experts():
    independent = torch.outer(torch.tensor([1, 2, 3]), torch.tensor([4, 1]))
    # Two experts a source, both its own: 2 bits of experts, of which the source tells all but 1.
    determined = torch.tensor([[5, 5, 0, 0], [0, 0, 5, 5]])
    assert mutual_information(independent) == pytest.approx(0, abs=1e-12)
    assert mutual_information(determined) == pytest.approx(1)
    both = mutual_information(torch.stack([determined, torch.ones(2, 4)]))
    torch.testing.assert_close(both, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_the_training_balance_averages_steps_then_layers():
    steps = [_passes([[6, 2], [4, 4]], [7, 8]), _passes([[4, 4], [8, 0]], [8, 5])]
    assert training_balance(steps) == {
        "max_vio_batch": [0.25, 0.5],
        "dead_experts": [0, 0],
        "drop_rate": {"1.0": (2 / 16 + 4 / 16) / 2, "1.25": (1 / 16 + 3 / 16) / 2},
        "trained_drop_rate": (1 / 16 + 3 / 16) / 2,
    }


@pytest.mark.parametrize("kind", [TopKGate, SSRGate])
def test_a_watch_sees_demand_routes_and_time_of_every_pass(kind):
    options = {"config": SSRConfig()} if kind is SSRGate else {}
    gates = [kind(8, 4, k=2, capacity_factor=0.5, min_capacity=1, **options) for _ in range(2)]
    watch = GateWatch(gates)
    with pytest.raises(RuntimeError, match="no forward pass"):
        watch.take()
    outputs = [gate(torch.randn(16, 8), None, True) for gate in gates for _ in range(2)]
    passes = watch.take()
    assert passes.demand_LE.sum(1).tolist() == [64, 64]
    assert passes.demand_LE[1].tolist() == (outputs[2][-1] + outputs[3][-1]).tolist()
    # Four slots for each of four experts.
    assert (passes.dispatched_L <= 2 * 16).all()
    assert passes.dispatched_L[0] == sum((output[3] >= 0).sum() for output in outputs[:2])
    assert torch.equal(watch.routes[1], outputs[3][3])
    assert passes.gate_seconds > 0
    watch.close()
    gates[0](torch.randn(16, 8), None, True)
    with pytest.raises(RuntimeError, match="no forward pass"):
        watch.take()


def test_recomputation_is_not_counted():
    gate = SSRGate(8, 4, k=2, config=SSRConfig())
    watch = GateWatch([gate])

    def weights(x):
        return gate(x, None, True)[5]

    checkpoint(weights, torch.randn(16, 8, requires_grad=True), use_reentrant=False).sum().backward()
    assert watch.take().demand_LE.sum() == 32
