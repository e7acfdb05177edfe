import numpy as np
import ot
import pytest
import torch
from scipy.special import expit, softmax
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import ssr_deepspeed.ot.problem
import ssr_deepspeed.ot.sinkhorn
import ssr_deepspeed.ot.solver
from ssr_deepspeed.config import RuleName, SSRConfig
from ssr_deepspeed.routing import RULES, compatibility, route
from tests.ot.problems import Operations
from tests.routing.formulas import array, counts_plan, routed, rule_gate, skewed, top_k

EXACT = {"name": "newton", "tolerance": 1e-6, "max_iterations": 100}


def test_every_rule_of_the_configuration_is_there():
    assert set(RULES) == set(RuleName.__args__)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_no_rule_is_plain_softmax_whatever_the_coin_says(k):
    gate, logits = rule_gate("none", k, probability=1.0), skewed(40, 6)
    weights_TE, l_aux, _ = routed(gate, logits)
    z_TE = array(logits)
    np.testing.assert_allclose(array(weights_TE), top_k(z_TE, softmax(z_TE, axis=1), k), rtol=1e-5)
    assert l_aux.item() == 0
    assert not gate.ssr.rule.state


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("k", [1, 2])
def test_s_base_selects_by_the_plan_of_pot_and_weighs_by_the_softmax(k, cost):
    gate, logits = rule_gate("s_base", k, entropy=0.4, cost=cost, solver=EXACT), skewed(48, 6)
    weights_TE, _, counts = routed(gate, logits)
    z_TE = array(logits)
    scores_TE = z_TE if cost == "linear" else softmax(z_TE, axis=1)
    plan_TE = ot.sinkhorn(np.ones(48), np.full(6, 8.0), -scores_TE, 0.4, stopThr=1e-10, numItermax=20000)
    np.testing.assert_allclose(array(weights_TE), top_k(plan_TE, softmax(z_TE, axis=1), k), rtol=1e-5)
    assert not np.array_equal(array(counts), (top_k(z_TE, softmax(z_TE, axis=1), k) > 0).sum(0)), "nothing moved"


@pytest.mark.parametrize("rule", ["s_base", "capacity", "carried", "loss_free", "quantile"])
@pytest.mark.parametrize("k", [1, 2])
def test_weights_by_the_softmax_have_the_gradient_of_the_renormalised_softmax(rule, k):
    gate, goal_TE = rule_gate(rule, k, cost="softmax", probability=1.0), torch.randn(24, 6, dtype=torch.float64)
    logits = skewed(24, 6).double().requires_grad_()
    weights_TE = routed(gate, logits)[0]
    (mine,) = torch.autograd.grad((weights_TE * goal_TE).sum(), logits)
    chosen_TE = weights_TE > 0

    def loss(values):
        weigh_TE = np.where(chosen_TE, softmax(values, axis=1), 0)
        return (weigh_TE / (weigh_TE.sum(1, keepdims=True) if k > 1 else 1) * goal_TE.numpy()).sum()

    z_TE, slope_TE = array(logits), np.zeros((24, 6))
    for place in np.ndindex(24, 6):
        step = np.zeros((24, 6))
        step[place] = 1e-5
        slope_TE[place] = (loss(z_TE + step) - loss(z_TE - step)) / 2e-5
    np.testing.assert_allclose(array(mine), slope_TE, rtol=0, atol=1e-8)
    assert np.abs(slope_TE).max() > 0.01


@pytest.mark.parametrize("weights", ["plan", "softmax"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_capacity_rule_solves_the_k_capacity_polytope_and_weighs_as_told(k, weights):
    gate = rule_gate("capacity", k, probability=1.0, entropy=0.3, weights=weights, solver={"max_iterations": 100})
    logits = skewed(48, 6)
    weights_TE = routed(gate, logits)[0]
    z_TE, potentials_E = array(logits), array(gate.ssr.solution.potentials)
    plan_TE = counts_plan(z_TE, potentials_E, k, 0.3)
    np.testing.assert_allclose(plan_TE.sum(0), np.full(6, 48 * k / 6), rtol=2e-3)
    weigh_TE = softmax(z_TE, axis=1) if weights == "softmax" or k == 1 else plan_TE
    np.testing.assert_allclose(array(weights_TE), top_k(z_TE + potentials_E, weigh_TE, k), rtol=1e-4)
    gate.ssr.transport = False
    plain_TE = routed(gate, logits)[0]
    np.testing.assert_allclose(array(plain_TE), top_k(z_TE, softmax(z_TE, axis=1), k), rtol=1e-5)


def test_a_plan_of_counts_weighs_through_its_own_shifts_and_reaches_the_scores():
    logits = skewed(20, 6).double().requires_grad_()
    potentials_E, shifts_T = torch.randn(6, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    plan = route(logits, potentials_E, k=3, entropy=0.5, shifts=shifts_T)
    expected_TE = expit((array(logits) + array(potentials_E) - array(shifts_T)[:, None]) / 0.5)
    chosen_TK = plan.experts_TK.numpy()
    np.testing.assert_allclose(array(plan.mass_TK), np.take_along_axis(expected_TE, chosen_TK, 1), rtol=1e-12)
    np.testing.assert_allclose(array(plan.log_mass_TK), np.log(array(plan.mass_TK)), rtol=1e-9)
    (slope,) = torch.autograd.grad(plan.mass_TK.sum(), logits)
    slope_TE = np.where(array(slope) != 0, expected_TE * (1 - expected_TE) / 0.5, 0)
    np.testing.assert_allclose(array(slope), slope_TE, rtol=1e-9)
    assert (array(slope) != 0).sum() == 60


@pytest.mark.parametrize("k", [1, 3])
def test_a_selection_without_its_plan_gives_the_softmax_of_the_chosen_and_no_gradient_to_the_selection(k):
    logits = skewed(20, 6).double().requires_grad_()
    scores_TE, potentials_E = torch.randn(2, 20, 6, dtype=torch.float64).unbind()[0], torch.randn(6).double()
    scores_TE.requires_grad_()
    plan = route(logits, potentials_E, k=k, scores=scores_TE, entropy=0.5, by_plan=False)
    order_TK = np.argsort(-(array(scores_TE) + array(potentials_E)), axis=1)[:, :k]
    np.testing.assert_array_equal(plan.experts_TK.numpy(), order_TK)
    probability_TE = softmax(array(logits), axis=1)
    np.testing.assert_allclose(array(plan.mass_TK), np.take_along_axis(probability_TE, order_TK, 1))
    slopes = torch.autograd.grad(plan.mass_TK.sum(), [logits, scores_TE], allow_unused=True)
    assert slopes[0].abs().sum() > 0
    assert slopes[1] is None


@pytest.mark.parametrize("k", [1, 2])
def test_routes_that_move_are_weighed_by_the_softmax_of_where_they_land(k):
    gate = rule_gate("s_base", k, drop=True, overflow="next", entropy=1.0)
    logits = skewed(48, 6)
    weights_TE, _, counts = routed(gate, logits)
    assert counts.max() > 8 * k
    chosen_TE = array(weights_TE) > 0
    np.testing.assert_array_equal(chosen_TE.sum(0), np.full(6, 8 * k))
    weigh_TE = np.where(chosen_TE, softmax(array(logits), axis=1), 0)
    expected_TE = weigh_TE / (weigh_TE.sum(1, keepdims=True) if k > 1 else 1)
    np.testing.assert_allclose(array(weights_TE), expected_TE, rtol=1e-5)


@pytest.mark.parametrize("rule", ["ssr", "capacity"])
@pytest.mark.parametrize("transport", [False, True])
def test_a_trigger_measures_what_softmax_would_have_asked_for(rule, transport):
    """Also where a step was routed by transport, and over all its micro-batches together, without padding."""
    gate = rule_gate(rule, 2, probability={"imbalance": 0.5})
    assert not gate.ssr.transport
    gate.ssr.transport = transport
    first, second = skewed(40, 6), skewed(24, 6, seed=1)
    used = torch.arange(24) % 3 != 0
    routed(gate, first)
    routed(gate, second, used)
    gate.eval()
    routed(gate, torch.randn(99, 6))
    gate.commit()
    rows = [*array(first), *array(second)[used.numpy()]]
    counts = np.bincount(np.concatenate([np.argsort(-row)[:2] for row in rows]), minlength=6)
    imbalance = gate.ssr.rule.state["imbalance"]
    assert imbalance.item() == pytest.approx(counts.max() / counts.mean() - 1)
    before = imbalance.clone()
    gate.commit()
    assert torch.equal(imbalance, before), "a step without tokens says nothing"
    assert gate.ssr.transport == (imbalance.item() > 0.5)
    gate.ssr.transport = not gate.ssr.transport
    gate.set_step(5)
    assert gate.ssr.transport == (imbalance.item() <= 0.5), "the coin has no say"


def test_a_share_of_transport_steps_keeps_no_state():
    for rule in ("ssr", "capacity"):
        gate = rule_gate(rule, probability=1.0)
        routed(gate, skewed(40, 6))
        gate.commit()
        assert gate.ssr.rule.state == {}
        assert gate.ssr.rule.sums is None


def test_the_coin_has_no_say_under_rules_without_transport_steps():
    """Noise for softmax steps then falls on all steps."""
    gate = rule_gate("none", probability=1.0, noise={"scale": 1.0, "steps": "softmax"})
    logits = skewed(40, 6)
    assert not torch.equal(routed(gate, logits)[0], routed(gate, logits)[0])


BLOCKS = {
    "carried mass": {"rule": "carried", "carried": {"polytope": "mass"}},
    "carried counts": {"rule": "carried"},
    "carried counts by its plan": {"rule": "carried", "weights": "plan"},
    "carried before": {"rule": "carried", "carried": {"refresh": "before"}},
    "carried solved": {"rule": "carried", "probability": 1.0, "carried": {"polytope": "mass"}},
    "loss_free": {"rule": "loss_free"},
    "quantile": {"rule": "quantile"},
    "auxiliary": {"rule": "auxiliary"},
    "s_base": {"rule": "s_base"},
    "noisy": {"rule": "noisy"},
    "trigger": {"rule": "ssr", "probability": {"imbalance": 0.1}},
}
by_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())


@by_block
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_routes_the_same_and_observes_nothing(block, reentrant):
    results = []
    for recompute in (False, True):
        gate, x = rule_gate(**block), skewed(32, 8).requires_grad_()
        passes = []

        def run(x, gate=gate, passes=passes):
            l_aux, _, _, indices, _, gates, _ = gate(x, None, True)
            passes.append(indices)
            return gates * torch.arange(1.0, 33), l_aux

        for step in range(2):
            torch.manual_seed(step)
            gates, l_aux = checkpoint(run, x, use_reentrant=reentrant) if recompute else run(x)
            (gates.square().sum() + l_aux).backward()
            if step == 0:
                gate.commit()
        assert len(passes) == (4 if recompute else 2)
        for one, again in zip(passes[::2], passes[1::2], strict=True) if recompute else ():
            assert torch.equal(one, again)
        gate.ssr.rule.gather()
        results.append((gate.wg.weight.grad, gate.ssr.rule.sums, gate.ssr.rule.state))
    plain, recomputed = results
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    assert plain[1] is None or plain[1].abs().sum() > 0


@pytest.fixture
def fresh_compiler():
    """Compiled code is kept by code object, and only so many versions of it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("noisy", "trigger", "carried solved")])
def test_the_gate_compiles_into_one_graph_under_every_rule(name, fresh_compiler):
    gate, other, x = rule_gate(**BLOCKS[name]), rule_gate(**BLOCKS[name]), torch.randn(64, 8)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for _ in range(2):  # the committed state is no constant of the graph
        for a, b in zip(gate(x, None, True), compiled(x, None, True), strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))
        torch.testing.assert_close(gate.ssr.rule.sums, other.ssr.rule.sums, rtol=1e-6, atol=0)
        for one in (gate, other):
            one.commit()
    torch.testing.assert_close(gate.ssr.rule.state, other.ssr.rule.state)


def test_a_compiled_loss_is_taken_to_be_asked_for(fresh_compiler):
    """A traced pass cannot tell whether a gradient comes back, and must not be accused of none."""
    gate = rule_gate("auxiliary")
    out = torch.compile(gate, backend="eager", fullgraph=True)(torch.randn(64, 8), None, True)
    (out[0] + out[5].square().sum()).backward()
    assert gate.ssr.loss_reached is None


@by_block
def test_nothing_is_read_from_the_device_under_any_rule(block):
    with FakeTensorMode():
        gate = rule_gate(**block)
        assert gate(torch.randn(64, 8), torch.ones(64), True)[3].shape == (2, 64)
        gate.ssr.rule.gather()
        if block["rule"] != "noisy" and gate.ssr.rule.sums is not None:  # Adam's steps are on the CPU: see test_rivals
            gate.ssr.rule.commit(gate.ssr.rule.sums, False)
        assert gate.eval()(torch.randn(64, 8), None, True)[3].shape == (2, 64)


@by_block
@pytest.mark.parametrize("transport", [False, True])
def test_on_an_accelerator_the_host_waits_in_solves_of_chosen_steps_alone(block, transport, monkeypatch):
    gate = rule_gate(**block)
    gate.ssr.transport = transport
    for module in (ssr_deepspeed.ot.problem, ssr_deepspeed.ot.sinkhorn, ssr_deepspeed.ot.solver):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    with Operations() as operations:
        gate(torch.randn(64, 8), torch.ones(64), True)
    assert bool(operations.reads) == (transport and block["rule"] in ("ssr", "capacity", "carried"))
    assert operations.counts.total() < 3000


@by_block
def test_a_batch_of_padding_alone_routes_and_teaches_nothing(block):
    gate, x = rule_gate(**block), torch.randn(16, 8)
    out = gate(x, torch.zeros(16), True)
    assert (out[3] == -1).all()
    (out[5].sum() + out[0]).backward()
    assert torch.equal(gate.wg.weight.grad, torch.zeros_like(gate.wg.weight))
    before = {name: value.clone() for name, value in gate.ssr.rule.state.items() if name != "steps"}
    gate.commit()
    torch.testing.assert_close({name: gate.ssr.rule.state[name] for name in before}, before, rtol=0, atol=1e-7)


@by_block
def test_the_logits_of_padding_change_no_state(block):
    states = []
    used = torch.arange(60) % 4 != 0
    for padding in (0.0, 50.0):
        gate, x = rule_gate(**block), skewed(60, 8)
        x[~used] = padding
        torch.manual_seed(1)
        out = gate(x, used, True)
        (out[5].square().sum() + out[0]).backward()
        gate.commit()
        states.append({"weight": gate.wg.weight.grad, **gate.ssr.rule.state})
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_compatibility_is_what_the_rules_say(cost):
    logits = skewed(10, 6)
    expected = array(logits) if cost == "linear" else softmax(array(logits), axis=1)
    np.testing.assert_allclose(array(compatibility(logits, cost)), expected, rtol=1e-5)


def test_a_default_rule_is_ours():
    assert type(rule_gate(SSRConfig().rule).ssr.rule) is RULES["carried"]
