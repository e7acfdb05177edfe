import math

import pytest
import torch
from deepspeed.moe.sharded_moe import MOELayer, TopKGate, topkgating
from torch._subclasses.fake_tensor import FakeTensorMode

import ssr_deepspeed.gate
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.ot import solve
from tests.gloo import run_ranks


def make_gate(k=2, experts=8, width=16, factor=1.0, eval_factor=2.0, least=4, drop=True, **block):
    block = {"rule": "ssr", "probability": 0.0, "gradient": "partial", **block}
    torch.manual_seed(3)
    return SSRGate(width, experts, k, factor, eval_factor, least, drop_tokens=drop, config=SSRConfig.from_dict(block))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("k", [3, 4, 8])
def test_a_softmax_step_is_topkgating(k, drop, sparse):
    gate, x = make_gate(k, drop=drop), torch.randn(64, 16) * 3
    logits = torch.nn.functional.linear(x, gate.wg.weight)
    ours = gate(x, None, sparse)
    theirs = topkgating(logits, k, 1.0, 4, drop, None, sparse_routes=sparse)
    assert len(ours) == len(theirs)
    # A route may take any slot of its expert.
    ours, theirs = (without_slots(form, sparse) for form in (ours, theirs))
    for mine, his in zip(ours, theirs, strict=True):
        if isinstance(his, torch.dtype):
            assert mine == his
            continue
        mine, his = torch.as_tensor(mine), torch.as_tensor(his)
        if his.is_floating_point():
            assert mine.dtype == his.dtype
            torch.testing.assert_close(mine, his)
        else:
            assert torch.equal(mine, his)


def without_slots(output, sparse):
    """What a gate returned after the auxiliary loss, with the slots summed out once they are found valid."""
    if sparse:
        _, capacity, experts, indices, locations, gates, counts = output
        slots = (indices * int(capacity) + locations)[indices >= 0]
        assert len(slots.unique()) == len(slots)
        assert int(locations.min()) >= 0
        assert int(locations.max()) < int(capacity)
        return capacity, experts, indices, locations.dtype, gates, counts
    _, combine, dispatch, counts = output
    assert int(dispatch.sum(0).max()) == int(dispatch.sum(2).max()) == 1
    assert torch.equal(dispatch, combine > 0)
    return combine.shape, combine.sum(2), dispatch.dtype, dispatch.any(2), counts


@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("drop", [True, False])
def test_both_return_forms_hold_the_same_routes_and_obey_the_contract(k, drop, transport):
    gate, x = make_gate(k, drop=drop), torch.randn(50, 16) * 3
    gate.ssr.transport = transport
    l_aux, capacity, experts, indices, locations, gates, counts = gate(x, None, True, False)
    _, combine, dispatch, dense_counts = gate(x, None, False, True)
    capacity = int(capacity)
    assert indices.dtype == locations.dtype == torch.int32
    assert gates.dtype == l_aux.dtype == torch.float32
    assert counts.dtype == torch.int64
    assert all(t.is_contiguous() and t.shape == (k, 50) for t in (indices, locations, gates))
    assert experts == 8
    assert int(counts.sum()) == 50 * k
    assert torch.equal(counts, dense_counts)
    rebuilt = torch.zeros(50, 8, capacity)
    for choice in range(k):
        for token in range(50):
            if indices[choice, token] >= 0:
                rebuilt[token, indices[choice, token], locations[choice, token]] += gates[choice, token]
    torch.testing.assert_close(combine, rebuilt)
    assert torch.equal(dispatch, combine > 0)
    assert int(dispatch.sum(0).max()) <= 1
    assert torch.equal(dispatch.sum((0, 2)), counts.clamp(max=capacity))


def test_the_auxiliary_loss_is_an_exact_zero_with_a_graph():
    gate, x = make_gate(), torch.randn(10, 16, requires_grad=True)
    l_aux = gate(x, None, True)[0]
    assert l_aux.item() == 0.0
    l_aux.backward()
    assert torch.equal(gate.wg.weight.grad, torch.zeros_like(gate.wg.weight))
    assert torch.equal(x.grad, torch.zeros_like(x))
    infinite = torch.full_like(x, math.inf)
    assert gate(infinite, None, True)[0].item() == 0.0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_evaluation_is_deterministic_plain_softmax_with_its_own_capacity(k):
    gate = make_gate(k, probability=1.0, noise={"scale": 5.0, "steps": "both"}, factor=1.0, eval_factor=2.0).eval()
    x = torch.randn(64, 16) * 3
    first, second = gate(x, None, True), gate(x, None, True)
    assert int(first[1]) == 64 * k * 2 // 8
    for a, b in zip(first, second, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    chosen = torch.nn.functional.linear(x, gate.wg.weight).topk(k).indices.t()
    kept = first[3] >= 0
    assert torch.equal(first[3].long()[kept], chosen[kept])


@pytest.mark.parametrize(
    ("steps", "on_softmax", "on_transport"), [("softmax", 1, 0), ("transport", 0, 1), ("both", 1, 1)]
)
def test_noise_falls_on_the_steps_it_is_for(steps, on_softmax, on_transport):
    gate, x = make_gate(noise={"scale": 3.0, "steps": steps}), torch.randn(64, 16)
    for transport, noisy in ((False, on_softmax), (True, on_transport)):
        gate.ssr.transport = transport
        gates = [gate(x, None, True)[5] for _ in range(2)]
        assert torch.equal(*gates) != bool(noisy)


def test_a_transport_step_balances_what_softmax_does_not():
    gate, x = make_gate(2, drop=False), torch.randn(512, 16) + 2 * torch.randn(16)
    softmax = gate(x, None, True)[-1]
    gate.ssr.transport = True
    transport = gate(x, None, True)[-1]
    assert transport.max() < 0.6 * softmax.max()
    assert float(gate.ssr.solution.error) <= 1e-3


@pytest.mark.parametrize("solver", ["sinkhorn", "newton", "sns", "adaptive"])
def test_every_solver_balances_a_transport_step_alike(solver):
    x = torch.randn(512, 16) + 2 * torch.randn(16)
    gate = make_gate(2, drop=False, probability=1.0, entropy=0.1, solver={"name": solver, "max_iterations": 400})
    counts = gate(x, None, True)[-1]
    assert not gate.ssr.solution.result
    exact = solve(torch.nn.functional.linear(x, gate.wg.weight).double(), 0.1, tolerance=1e-9, max_iterations=5000)
    torch.testing.assert_close(gate.ssr.solution.potentials.double(), exact.potentials, rtol=0, atol=2e-3)
    assert counts.max() < 1.2 * counts.float().mean()


@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_route_is_lost_at_capacity_one_when_they_move_to_the_next_best_expert(k, training, transport):
    gate = make_gate(k, factor=1.0, eval_factor=1.0, overflow="next").train(training)
    gate.ssr.transport = transport
    x = torch.randn(64, 16) + 2 * torch.randn(16)
    _, capacity, _, indices, locations, gates, counts = gate(x, None, True)
    assert capacity == 8 * k
    assert int(counts.max()) > capacity  # there was something to move
    assert (indices >= 0).all()
    assert torch.equal(gate.ssr.dispatched_E, torch.full((8,), capacity))
    assert all(len(set(column)) == k for column in indices.t().tolist())
    slots = set(zip(indices.flatten().tolist(), locations.flatten().tolist(), strict=True))
    assert slots == {(expert, slot) for expert in range(8) for slot in range(capacity)}
    logits = torch.nn.functional.linear(x, gate.wg.weight)
    if k == 1:
        expected = torch.softmax(logits, dim=1).gather(1, indices.t().long())
    else:
        scores = logits + (gate.ssr.solution.potentials if transport and training else 0.0)
        expected = torch.softmax(scores.gather(1, indices.t().long()), dim=1)
    torch.testing.assert_close(gates.t(), expected)
    combine, dispatch = gate(x, None, False)[1:3]
    torch.testing.assert_close(combine.sum((1, 2)), gates.sum(0))
    assert int(dispatch.sum()) == 64 * k


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_token_whose_routes_all_moved_far_down_its_list_keeps_its_whole_weight(factor):
    """Two experts lead by 150 nats, further than fp32 reaches, and most tokens get neither."""
    gate = make_gate(2, overflow="next", factor=factor, least=1)
    logits = torch.randn(64, 8)
    logits[:, :2] += 150
    logits.requires_grad_()
    indices, _, gates = gate.routes_of(logits, None, True)[3:6]
    kept = (indices >= 0).any(0)
    assert int(kept.sum()) >= 64 * factor
    torch.testing.assert_close(gates.sum(0), kept.float())
    (slope,) = torch.autograd.grad((gates * torch.randn(2, 64)).sum(), logits)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(slope.sum(1), torch.zeros(64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_moved_routes_reach_the_weight_through_their_own_scores(k):
    gate = make_gate(k, overflow="next")
    x = torch.randn(64, 16) + 2 * torch.randn(16)
    weight = gate.wg.weight
    gates, goal = gate(x, None, True)[3:6:2][1], torch.randn(k, 64)
    (mine,) = torch.autograd.grad((gates * goal).sum(), weight)
    indices = gate(x, None, True)[3].t().long()
    logits = torch.nn.functional.linear(x, weight)
    chosen = torch.softmax(logits, dim=1).gather(1, indices)
    if k > 1:
        chosen = chosen / chosen.sum(1, keepdim=True)
    (expected,) = torch.autograd.grad((chosen.t() * goal).sum(), weight)
    torch.testing.assert_close(mine, expected)


def test_padding_takes_no_slot_from_routes_that_move():
    gate = make_gate(2, overflow="next", factor=0.75)
    x, used = torch.randn(64, 16) + 2 * torch.randn(16), torch.arange(64) % 4 != 0
    indices = gate(x, used, True)[3]
    assert (indices[:, used] >= 0).all()
    assert (indices[:, ~used] == -1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_flagged_in_training_only(bad):
    gate, x = make_gate(2, probability=1.0), torch.randn(64, 16)
    gate.ssr.nonfinite = torch.tensor(False)
    gate(x, None, True)
    assert not gate.ssr.nonfinite
    spoilt = x.clone()
    spoilt[5] = bad
    gate.eval()(spoilt, None, True)
    assert not gate.ssr.nonfinite
    out = gate.train()(spoilt, None, True)
    assert gate.ssr.nonfinite
    gate(x, None, True)
    assert gate.ssr.nonfinite, "one clean micro-batch hides nothing"
    assert ((out[3] >= -1) & (out[3] < 8)).all()
    assert torch.isfinite(out[5][:, torch.arange(64) != 5]).all()


@pytest.mark.parametrize("gradient", ["detach", "partial", "implicit"])
def test_the_gradient_option_reaches_the_weight(gradient):
    x = torch.randn(64, 16)
    goal = torch.randn(2, 64)

    def gradient_of(name):
        gate = make_gate(2, drop=False, gradient=name, probability=1.0)
        gates = gate(x, None, True)[5]
        if not gates.requires_grad:
            return None
        (gates * goal).sum().backward()
        return gate.wg.weight.grad

    mine = gradient_of(gradient)
    assert (mine is None) == (gradient == "detach")
    if gradient == "implicit":
        partial = gradient_of("partial")
        assert not torch.allclose(mine, partial)
        assert torch.cosine_similarity(mine.flatten(), partial.flatten(), dim=0) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_fp32_whatever_the_engines_dtype_and_autocast(dtype):
    gate, x = make_gate(probability=1.0), torch.randn(64, 16).to(dtype)
    expected = gate(x.float(), None, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gate(x, None, True)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("form", [torch.bool, torch.int64, torch.float32])
def test_padding_changes_nothing_for_the_tokens_in_use(k, transport, form):
    gate, x = make_gate(k, drop=False), torch.randn(60, 16)
    gate.ssr.transport = transport
    used = torch.arange(60) % 4 != 0
    padded = x.clone()
    padded[~used] = 100.0
    bare = gate(x[used], None, True)
    full = gate(padded, used.to(form).reshape(6, 10), True)
    assert torch.equal(full[-1], bare[-1])
    assert torch.equal(full[3][:, used], bare[3])
    assert torch.equal(full[3][:, ~used], torch.full_like(full[3][:, ~used], -1))
    torch.testing.assert_close(full[5][:, used], bare[5])
    assert not full[5][:, ~used].any()


def test_a_batch_of_padding_alone_routes_nothing():
    gate = make_gate(drop=False, probability=1.0)
    out = gate(torch.randn(6, 16), torch.zeros(6), True)
    assert int(out[-1].sum()) == 0
    assert int(out[1]) == 1
    assert (out[3] == -1).all()


def test_fewer_tokens_than_the_least_capacity_are_all_kept():
    out = make_gate(1, least=8)(torch.randn(3, 16), None, True)
    assert int(out[1]) == 8
    assert (out[3] >= 0).all()


def test_the_state_dict_is_topkgates_both_ways():
    ours, theirs = make_gate(), TopKGate(16, 8, 2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_what_a_rule_keeps_follows_the_gate_and_stays_fp32():
    with torch.device("meta"):
        gate = make_gate(rule="carried")
    gate.to_empty(device="cpu")
    assert not gate.ssr.rule.state["potentials"].any()
    gate.ssr.rule.state["potentials"] += 1
    gate.to(torch.bfloat16)
    assert gate.ssr.rule.state["potentials"].tolist() == [1.0] * 8
    assert gate.ssr.rule.state["potentials"].dtype == torch.float32
    gate.to("meta")
    assert gate.ssr.rule.state["potentials"].is_meta and gate.ssr.rule.sums.is_meta


def test_a_gate_that_is_ssrs_already_takes_the_new_settings():
    gate = make_gate(probability=0.0)
    assert not gate.ssr.transport
    assert SSRGate.adopt(gate, SSRConfig(probability=1.0), 5) is gate
    assert gate.ssr.transport
    assert gate.ssr.layer == 5


def test_nothing_is_read_from_the_device():
    with FakeTensorMode():
        gate = make_gate(2, probability=1.0)
        assert gate(torch.randn(64, 16), torch.ones(64), True)[3].shape == (2, 64)


def test_adopting_keeps_the_weight_and_releasing_gives_the_gate_back():
    gate = TopKGate(16, 8, 3)
    weight, handle = gate.wg.weight, gate.register_forward_hook(lambda *_: None)
    before = dict(vars(gate))
    adopted = SSRGate.adopt(gate, SSRConfig(), 0)
    assert adopted is gate
    assert isinstance(gate, TopKGate)
    assert gate.wg.weight is weight
    assert handle.id in gate._forward_hooks
    assert type(gate.release()) is TopKGate
    assert vars(gate) == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda gate: setattr(gate, "forward", lambda *inputs: inputs), "forward of its own"),
        (lambda gate: setattr(gate, "k", 9), "k = 9 experts a token out of 8"),
        (lambda gate: setattr(gate, "__class__", type("MyGate", (TopKGate,), {})), "MyGate is a gate of its own kind"),
    ],
)
def test_a_gate_that_cannot_be_replaced_is_refused(spoil, words):
    gate = TopKGate(16, 8, 2)
    spoil(gate)
    with pytest.raises(ValueError, match=words):
        SSRGate.adopt(gate, SSRConfig(), 0)


def test_the_wall_clock_breakdown_sees_the_gate():
    gate = make_gate()
    gate.wall_clock_breakdown = True
    gate(torch.randn(64, 16), None, True)
    assert gate.gate_time > 0


def test_the_layer_dispatches_and_combines_with_it():
    """With identity experts, a token whose routes all survive comes back as itself."""
    gate = make_gate(2, drop=False, probability=1.0)
    layer = MOELayer(gate, torch.nn.Identity(), "ep_size_1", 1, 8)
    x = torch.randn(4, 10, 16)
    torch.testing.assert_close(layer(x, None), x)
    assert float(layer.l_aux) == 0


def test_the_tutel_form_of_the_old_contract_has_lists(monkeypatch):
    monkeypatch.setattr(ssr_deepspeed.gate, "HOST_HAS_SPARSE_ROUTES", False)
    out = make_gate(1)(torch.randn(64, 16), None, True)
    assert [type(out[i]) for i in (3, 4, 5)] == [list] * 3
    assert len(out[3]) == 1
    assert out[3][0].shape == (64,)


@pytest.mark.parametrize(
    ("drop", "transport", "overflow"),
    [(True, False, "drop"), (True, True, "drop"), (False, True, "drop"), (True, False, "next"), (True, True, "next")],
)
def test_the_gate_compiles_into_one_graph(drop, transport, overflow):
    gate, x = make_gate(2, drop=drop, gradient="implicit", overflow=overflow), torch.randn(64, 16)
    gate.ssr.transport = transport
    expected = gate(x, None, True)
    compiled = torch.compile(gate, backend="eager", fullgraph=True)(x, None, True)
    for a, b in zip(expected, compiled, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


def _scope_without_group():
    gate = make_gate(scope="data_parallel", probability=1.0)
    with pytest.raises(RuntimeError, match="balances over the data_parallel group, but this router has none"):
        gate(torch.randn(8, 16), None, True)


def test_a_scope_that_lacks_its_group_is_an_error(tmp_path):
    run_ranks(2, _scope_without_group, folder=tmp_path)
