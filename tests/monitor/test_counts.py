import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ssr_deepspeed.monitor import LoadMonitor, layer_metrics
from ssr_deepspeed.monitor.sinks import engine_events
from ssr_deepspeed.routing import max_violation


def make_monitor(interval=2, experts=(4, 3), copies=1):
    return LoadMonitor(
        [f"layer {i}" for i in range(len(experts))], list(experts), interval, torch.device("cpu"), copies
    )


def test_counts_of_a_window_by_step_layer_and_expert():
    monitor = make_monitor()
    monitor.add(0, torch.tensor([4, 0, 2, 2]), torch.tensor([3, 0, 2, 2]), None)
    monitor.add(0, torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 1, 1]), torch.tensor(0.5))
    assert monitor.end_step(0) is None
    monitor.add(1, torch.tensor([2, 2, 2]), torch.tensor([2, 2, 2]), None)
    window = monitor.end_step(1)
    assert (window.first_step, window.steps) == (0, 2)
    assert window.demand_WLE[0].tolist() == [[5, 1, 3, 3], [0, 0, 0, 0]]
    assert window.dispatched_WLE[0, 0].tolist() == [4, 1, 3, 3]
    assert window.demand_WLE[1].tolist() == [[0, 0, 0, 0], [2, 2, 2, 0]]
    assert window.transport_share_L.tolist() == [0.5, 0.0]
    assert window.column_error_L[0] == 0.5
    assert math.isnan(window.column_error_L[1])
    assert not make_monitor()._collect(0, 2).demand_WLE.any()


def test_a_window_begins_empty_and_ends_at_multiples_of_the_interval_after_a_resume():
    monitor = make_monitor(interval=5)
    ends = []
    for step in range(3, 14):
        monitor.add(0, torch.ones(4), torch.ones(4), None)
        window = monitor.end_step(step)
        if window:
            ends.append((step + 1, window.steps, window.demand_WLE[:, 0].sum().item()))
    assert ends == [(5, 2, 8), (10, 5, 20)]


def test_tensor_parallel_copies_are_counted_once():
    monitor = make_monitor(interval=1, copies=2)
    monitor.add(0, torch.full((4,), 6), torch.full((4,), 6), None)
    assert monitor.end_step(0).demand_WLE[0, 0].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_counted(reentrant):
    monitor = make_monitor(interval=1)

    def layer(x):
        monitor.add(0, torch.ones(4), torch.ones(4), None)
        return x.sin()

    checkpoint(layer, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert monitor.end_step(0).demand_WLE.sum() == 4


def test_metrics_are_those_of_their_definitions():
    monitor = make_monitor(experts=(4,))
    for step, load in enumerate(([8, 4, 4, 0], [4, 4, 8, 0])):
        load = torch.tensor(load)
        monitor.add(0, load, load.clamp(max=6), None)
        window = monitor.end_step(step)
    figures = layer_metrics(window)["layer 0"]
    assert figures["max_vio"] == 1.0
    assert figures["max_vio_window"] == 0.5
    assert figures["min_vio"] == -1.0
    assert figures["dead_share"] == 0.25
    assert figures["drop_rate"] == pytest.approx(4 / 32)
    assert figures["load"] == [0.375, 0.25, 0.375, 0]
    assert figures["cv"] == pytest.approx(torch.tensor([12.0, 8, 12, 0]).std(correction=0).item() / 8, abs=1e-6)
    entropy = -sum(p * math.log(p) for p in (0.375, 0.25, 0.375))
    assert figures["effective_experts"] == pytest.approx(math.exp(entropy) / 4, abs=1e-6)
    assert figures["column_error"] is None


def test_a_layer_that_routed_nothing_has_no_figures_rather_than_false_ones():
    figures = layer_metrics(make_monitor(interval=1).end_step(0))["layer 0"]
    assert figures["max_vio"] is None
    assert figures["drop_rate"] is None
    assert "max_vio" not in str(engine_events({"layer 0": figures}, 1))


def test_max_violation_is_zero_for_even_load():
    assert max_violation(torch.tensor([[3.0, 3.0], [4.0, 2.0]])).tolist() == pytest.approx([0, 1 / 3])
