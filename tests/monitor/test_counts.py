import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ssr_deepspeed.monitor.counts
from ssr_deepspeed.monitor import METRICS, LoadMonitor, layer_metrics, model_metrics, sample_pass
from ssr_deepspeed.monitor.sinks import engine_events, load_records, scalars
from ssr_deepspeed.ot import Solution
from ssr_deepspeed.routing import max_violation
from tests.waits import NumbersAssigned


def make_monitor(interval=2, experts=(4, 3), copies=1):
    return LoadMonitor(
        [f"layer {i}" for i in range(len(experts))], list(experts), interval, torch.device("cpu"), copies
    )


def counted(demand, dispatched=None, **more):
    """Arguments of `LoadMonitor.add`."""
    dispatched_E = None if dispatched is None else torch.as_tensor(dispatched)
    return {"demand_E": torch.as_tensor(demand), "dispatched_E": dispatched_E, **more}


def solution(error, iterations, tolerance=1e-3):
    return Solution(torch.zeros(4), torch.tensor(error), torch.tensor(iterations), tolerance)


def test_counts_of_a_window_by_step_layer_and_expert():
    monitor = make_monitor()
    monitor.add(0, **counted([4, 0, 2, 2], [3, 0, 2, 2]))
    monitor.add(0, **counted([1, 1, 1, 1], [1, 1, 1, 1], solution=solution(0.5, 7)))
    assert monitor.end_step(0) is None
    monitor.add(1, **counted([2, 2, 2], [2, 2, 2]))
    window = monitor.end_step(1)
    assert (window.first_step, window.steps) == (0, 2)
    assert window.demand_WLE[0].tolist() == [[5, 1, 3, 3], [0, 0, 0, 0]]
    assert window.dispatched_WLE[0, 0].tolist() == [4, 1, 3, 3]
    assert window.demand_WLE[1].tolist() == [[0, 0, 0, 0], [2, 2, 2, 0]]
    assert window.transport_share_L.tolist() == [0.5, 0.0]
    assert window.column_error_L[0] == 0.5
    assert window.sweeps_L[0] == 7
    assert window.unconverged_L[0] == 1
    assert math.isnan(window.column_error_L[1])


def test_a_window_begins_empty_and_ends_at_multiples_of_the_interval_after_a_resume():
    monitor = make_monitor(interval=5)
    ends = []
    for step in range(3, 14):
        monitor.add(0, **counted(torch.ones(4), torch.ones(4)))
        window = monitor.end_step(step)
        if window:
            ends.append((step + 1, window.steps, window.demand_WLE[:, 0].sum().item()))
    assert ends == [(5, 2, 8), (10, 5, 20)]


def test_tensor_parallel_copies_are_counted_once():
    monitor = make_monitor(interval=1, copies=2)
    monitor.add(0, **counted(torch.full((4,), 6), torch.full((4,), 6)))
    assert monitor.end_step(0).demand_WLE[0, 0].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_counted(reentrant):
    monitor = make_monitor(interval=1)

    def layer(x):
        monitor.add(0, **counted(torch.ones(4), torch.ones(4)))
        return x.sin()

    checkpoint(layer, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert monitor.end_step(0).demand_WLE.sum() == 4


def test_metrics_are_those_of_their_definitions():
    monitor = make_monitor(experts=(4,))
    for step, load in enumerate(([8, 4, 4, 0], [4, 4, 8, 0])):
        load = torch.tensor(load)
        monitor.add(0, **counted(load, load.clamp(max=6)))
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
    layers = {"layer 0": figures}
    assert engine_events({"layers": layers, "model": model_metrics(layers)}, 1) == []


def test_max_violation_is_zero_for_even_load():
    assert max_violation(torch.tensor([[3.0, 3.0], [4.0, 2.0]])).tolist() == pytest.approx([0, 1 / 3])


def test_a_full_expert_dispatches_what_it_has_slots_for_and_the_slots_are_counted():
    monitor = make_monitor(interval=1)
    monitor.add(0, **counted([5, 1, 0, 2], capacity=3))
    monitor.add(1, **counted([5, 1, 2]))
    figures = layer_metrics(monitor.end_step(0))
    assert figures["layer 0"]["drop_rate"] == 2 / 8
    assert figures["layer 0"]["slot_fill"] == 6 / 12
    assert figures["layer 1"]["drop_rate"] == 0
    assert figures["layer 1"]["slot_fill"] is None


def test_figures_are_the_same_under_another_default_device():
    monitor = make_monitor(interval=1)
    monitor.add(0, **counted([4, 0, 2, 2], [3, 0, 2, 2]))
    monitor.add(1, **counted([1, 1, 2], [1, 1, 2]))
    window = monitor.end_step(0)
    expected = layer_metrics(window)
    with torch.device("meta"):
        assert layer_metrics(window) == expected


def test_a_straggler_is_the_fullest_rank_of_each_micro_batch_and_then_the_mean(monkeypatch):
    """Rank 0 holds the first two experts, rank 1 the others, and both count the same."""
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "all_reduce", lambda total: total.mul_(2))
    monitor = LoadMonitor(["a", "b"], [4, 4], 2, torch.device("cpu"), micro_batches=2)
    monitor.place(0, [0, 1])
    monitor.add(0, **counted([9, 9, 0, 0]))
    monitor.end_step(0)
    for load in ([3, 3, 1, 1], [0, 2, 3, 3]):
        monitor.add(0, **counted(load))
        monitor.add(1, **counted(load))
    with NumbersAssigned() as numbers:
        window = monitor.end_step(1)
    assert numbers.found == [], "a device would have been waited for"
    assert window.received_GLR[:, 0].tolist() == [[12, 4], [4, 12]]
    window.present_LR[0] = 1  # as the other rank would say
    # By micro-batch 6 of 4 on average each; summed first, nobody would be late.
    assert layer_metrics(window)["a"]["straggler"] == 1.5
    assert layer_metrics(window)["b"]["straggler"] is None


def test_a_window_goes_on_from_a_checkpoint_as_if_nothing_had_happened(monkeypatch):
    def step(monitor, number):
        for layer in (0, 1):
            generator = torch.Generator().manual_seed(10 * number + layer)
            load = torch.randint(9, (4 - layer,), generator=generator)
            monitor.add(layer, **counted(load, capacity=5, solution=solution(0.1 * number, number)))
        return monitor.end_step(number)

    whole, first = make_monitor(interval=4), make_monitor(interval=4)
    for number in range(2):
        step(whole, number)
        step(first, number)
    saved = first.save()
    resumed = make_monitor(interval=4)
    step(resumed, 7)  # of a run that is left
    resumed.load(saved)
    step(whole, 2), step(resumed, 2)
    figures = layer_metrics(step(whole, 3))
    assert figures == layer_metrics(step(resumed, 3))
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ssr_deepspeed.monitor.counts.dist, "all_reduce", lambda total: None)
    more_ranks = make_monitor(interval=4)
    more_ranks.load(saved)
    step(more_ranks, 2)
    assert layer_metrics(step(more_ranks, 3))["layer 0"]["slot_fill"] == figures["layer 0"]["slot_fill"]
    monkeypatch.undo()
    other = make_monitor(interval=5)
    other.load(saved)
    assert [other.end_step(number) for number in range(2, 4)] == [None, None]
    assert other.end_step(4).steps == 3


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize("most_routes", [1, 2**20])
def test_counts_are_the_same_however_many_passes_are_added_at_once(monkeypatch, at_once, most_routes):
    """Layers of two widths, one of whose hosts gives indices; micro-batches that vary in number, size and padding."""
    monkeypatch.setattr(ssr_deepspeed.monitor.counts, "_AT_ONCE", at_once)
    monkeypatch.setattr(ssr_deepspeed.monitor.counts, "_MOST_ROUTES", most_routes)
    monitor = make_monitor(interval=6, experts=(4, 3, 4))
    demand, dispatched = torch.zeros(6, 3, 4), torch.zeros(6, 3, 4)
    slots, solved = [0, 0, 0], 0
    for step in range(6):
        for micro_batch in range(1 + step % 3):
            load, capacity = torch.randint(9, (4,)), 3 + step % 2 + micro_batch
            solving = (step + micro_batch) % 4 == 0
            monitor.add(0, **counted(load, capacity=capacity, solution=solution(0.5, 7) if solving else None))
            indices, used = torch.randint(3, (5 + micro_batch, 2)), torch.rand(5 + micro_batch) < 0.6
            monitor.add_routes(1, indices, used if micro_batch else None, None)
            monitor.add(2, **counted(load, load // 2))
            chosen = torch.bincount((indices[used] if micro_batch else indices).flatten(), minlength=4)
            demand[step] += torch.stack([load, chosen, load])
            dispatched[step] += torch.stack([load.clamp(max=capacity), chosen, load // 2])
            slots[0] += 4 * capacity
            solved += solving
        window = monitor.end_step(step)
        if step == 3:
            monitor.load(monitor.save())  # a checkpoint between
    assert torch.equal(window.demand_WLE, demand.double())
    assert torch.equal(window.dispatched_WLE, dispatched.double())
    assert window.slots_L.tolist() == slots
    assert window.transport_share_L.tolist() == [pytest.approx(solved / 12), 0, 0]
    assert window.sweeps_L[0] == 7


def test_on_an_accelerator_a_window_is_read_one_step_later_or_when_asked(monkeypatch):
    monkeypatch.setattr(ssr_deepspeed.monitor.counts, "to_host", lambda total: (total.clone(), None))
    monitor = make_monitor(interval=2)
    monitor.reads_at_once = False
    found = []
    for number in range(6):
        monitor.add(0, **counted([number, 0, 0, 0]))
        window = monitor.end_step(number)
        found.append(window and (window.first_step, window.demand_WLE[:, 0, 0].tolist()))
    assert found == [None, None, (0, [0, 1]), None, (2, [2, 3]), None]
    assert monitor.settle().demand_WLE[:, 0, 0].tolist() == [4, 5]
    assert monitor.settle() is None


def test_a_sample_says_what_the_softmax_would_have_done():
    """Against a count token by token."""
    logits, experts = torch.randn(50, 6), torch.randint(6, (50, 2))
    experts[7, 1] = -1
    logits[3, 2] = math.nan
    used = torch.arange(50) != 9
    sample = sample_pass(logits, experts, torch.arange(6), used, torch.tensor(2.5))
    tokens = [t for t in range(50) if t not in (3, 9)]
    p = logits.double().softmax(1)
    before, elsewhere, routes = [0] * 6, 0, 0
    for t in tokens:
        own = sorted(range(6), key=lambda e, t=t: -logits[t, e])[:2]
        for e in own:
            before[e] += 1
        chosen = [e for e in experts[t].tolist() if e >= 0]
        routes += len(chosen)
        elsewhere += sum(e not in own for e in chosen)
    entropy = sum(-(p[t] * p[t].log()).sum() for t in tokens)
    mass = sum(-p[t].topk(2).values.sum().log() for t in tokens)
    expected = [48, 1, entropy, mass, routes, elsewhere, 2.5, 1]
    assert sample.sums.tolist() == pytest.approx([float(x) for x in expected], rel=1e-5)
    assert sample.before_E.tolist() == before
    monitor = make_monitor(interval=1, experts=(6,))
    assert monitor.add(0, **counted(torch.arange(6)))
    monitor.sample(0, False, lambda: sample)
    assert not monitor.add_routes(0, torch.zeros(0, 2, dtype=torch.int64), None, None)
    figures = layer_metrics(monitor.end_step(0))["layer 0"]
    assert figures["rerouted"] == pytest.approx(elsewhere / routes, abs=1e-6)
    assert figures["router_entropy"] == pytest.approx(float(entropy) / 48 / math.log(6), abs=1e-5)
    assert figures["nonfinite"] == pytest.approx(1 / 49, abs=1e-6)
    assert figures["max_vio_softmax"] == pytest.approx(max(before) / (sum(before) / 6) - 1, abs=1e-5)
    assert figures["max_vio_routed"] == pytest.approx(5 / 2.5 - 1)
    assert figures["potential"] == 2.5


def test_a_transport_pass_is_looked_at_rather_than_the_first():
    monitor, wanted = make_monitor(interval=5), []
    for solved in (None, None, solution(0.5, 7), solution(0.5, 7), None):
        wanted.append(monitor.add(0, **counted([1, 1, 1, 1], solution=solved)))
        if wanted[-1]:
            monitor.sample(0, solved is not None, lambda: None)
    assert wanted == [True, False, True, False, False]


def test_a_report_is_written_as_figures_and_loads_and_its_scalars_are_few():
    names = [f"layer {i}" for i in range(40)]
    monitor = LoadMonitor(names, [64] * 40, 1, torch.device("cpu"))
    for layer in range(40):
        monitor.add(layer, **counted(torch.arange(64) + 64 * layer))
    layers = layer_metrics(monitor.end_step(0))
    report = {"kind": "load", "step": 1, "layers": layers, "model": model_metrics(layers)}
    figures, experts = load_records(report)
    assert set(figures["layers"]["layer 3"]) == set(METRICS)
    assert experts["load_over_mean"][3][:2] == [
        pytest.approx(192 / 223.5, abs=1e-3),
        pytest.approx(193 / 223.5, abs=1e-3),
    ]
    assert report["model"]["max_vio"]["layer"] == "layer 0"
    found = scalars(report)
    assert len(found) <= 16 * 7 + 12
    assert found["max_vio_worst"] == report["model"]["max_vio"]["worst"]
