import numpy as np
import ot
import pytest
import torch
from scipy.special import softmax

from benchmarks.inputs import logits as router_logits
from ssr_deepspeed.routing import max_violation
from tests.routing.formulas import array, plan_of, routed, rule_gate, skewed, top_k

POLYTOPES = ["mass", "capacity"]
EXACT = {"name": "newton", "tolerance": 1e-6, "max_iterations": 100}
by_polytope = pytest.mark.parametrize("polytope", POLYTOPES)


def carried_gate(polytope, k=2, potentials=None, refresh="after", damping=1.0, **block):
    block = {"entropy": 0.5, "weights": "softmax", **block}
    carried = {"polytope": polytope, "refresh": refresh, "damping": damping}
    gate = rule_gate("carried", k, carried=carried, **block)
    if potentials is not None:
        gate.ssr.rule.state["potentials"].copy_(potentials)
    return gate


def potentials_of(gate):
    return gate.ssr.rule.state["potentials"]


def swept(polytope, batches, potentials_E, k, xi, damping=1.0):
    """`g + damping xi log(mean(c) / c)`, or of what is left out where k is more than half; mean zero."""
    experts = len(potentials_E)
    column_E = sum(plan_of(polytope, scores_TE, potentials_E, k, xi).sum(0) for scores_TE in batches)
    step_E = np.log(column_E.mean() / column_E)
    if polytope == "capacity" and 2 * k > experts:
        left_E = sum(map(len, batches)) - column_E
        step_E = np.log(left_E / left_E.mean())
    moved_E = potentials_E + damping * xi * step_E
    return moved_E - moved_E.mean()


@by_polytope
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_a_commit_is_one_damped_sweep_and_leaves_the_mean_at_zero(polytope, k, cost):
    start_E = torch.tensor([0.4, -0.1, 0.3, 0.0, -0.5, -0.1])
    gate = carried_gate(polytope, k, start_E, damping=0.7, cost=cost)
    logits = skewed(40, 6)
    routed(gate, logits)
    assert torch.equal(potentials_of(gate), start_E), "nothing is committed before the step's end"
    gate.commit()
    scores_TE = array(logits) if cost == "linear" else softmax(array(logits), axis=1)
    expected_E = swept(polytope, [scores_TE], array(start_E), k, 0.5, 0.7)
    np.testing.assert_allclose(array(potentials_of(gate)), expected_E, rtol=0, atol=1e-4)
    assert np.abs(expected_E - array(start_E)).max() > 0.05
    assert potentials_of(gate).mean().abs() < 1e-6


@by_polytope
@pytest.mark.parametrize("refresh", ["after", "before"])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_every_token_to_every_expert_leaves_nothing_to_balance(polytope, refresh, probability):
    gate, logits = carried_gate(polytope, 6, refresh=refresh, probability=probability), skewed(40, 6)
    weights_TE = routed(gate, logits)[0]
    np.testing.assert_allclose(array(weights_TE), softmax(array(logits), axis=1), rtol=1e-5)
    gate.commit()
    if polytope == "capacity":
        assert not potentials_of(gate).any()


@by_polytope
def test_micro_batches_of_a_step_move_the_potentials_as_one_batch_of_all_does(polytope):
    """Each routed by the same committed potentials, and padding, even a whole micro-batch of it, left out."""
    first, second, padding = skewed(40, 6), skewed(24, 6, seed=1), torch.randn(16, 6) + 3
    used = torch.arange(24) % 3 != 0
    parts, whole = carried_gate(polytope), carried_gate(polytope)
    for _ in range(3):
        routed(parts, first)
        routed(parts, second, used)
        routed(parts, padding, torch.zeros(16))
        routed(whole, torch.cat([first, second[used]]))
        parts.commit()
        whole.commit()
    torch.testing.assert_close(potentials_of(parts), potentials_of(whole), rtol=0, atol=1e-6)
    assert potentials_of(whole).abs().max() > 0.3


@by_polytope
@pytest.mark.parametrize("weights", ["softmax", "shifted", "plan"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_committed_potentials_select_and_what_was_asked_for_weighs(polytope, weights, k):
    start_E = torch.tensor([-1.5, 0.2, -0.7, 0.4, 0.3, 1.3])
    gate, logits = carried_gate(polytope, k, start_E, weights=weights), skewed(40, 6)
    weights_TE, l_aux, _ = routed(gate, logits)
    z_TE = array(logits)
    by = {"plan": plan_of(polytope, z_TE, array(start_E), k, 0.5), "shifted": softmax(z_TE + array(start_E), axis=1)}
    weigh_TE = by[weights] if weights in by and k > 1 else softmax(z_TE, axis=1)
    np.testing.assert_allclose(array(weights_TE), top_k(z_TE + array(start_E), weigh_TE, k), rtol=1e-3)
    assert (array(weights_TE > 0) != (top_k(z_TE, z_TE, k) != 0)).any(), "the potentials changed no choice"
    assert l_aux.item() == 0


@by_polytope
@pytest.mark.parametrize("refresh", ["after", "before"])
@pytest.mark.parametrize("weights", ["shifted", "plan"])
def test_a_centred_gradient_is_the_partial_one_less_its_mean_over_the_tokens_in_use(polytope, refresh, weights):
    used, goal_TE = torch.arange(40) % 5 != 0, torch.randn(40, 6)

    def weigh(kind, logits):
        start_E = torch.tensor([-1.5, 0.2, -0.7, 0.4, 0.3, 1.3])
        gate = carried_gate(polytope, 2, start_E, refresh=refresh, weights=weights, gradient=kind)
        return routed(gate, logits, used)[0]

    def gradient(kind):
        logits = skewed(40, 6).requires_grad_()
        weights_TE = weigh(kind, logits)
        (weights_TE * goal_TE).sum().backward()
        return array(logits.grad), array(weights_TE)

    (partial_TE, first_TE), (centred_TE, second_TE) = gradient("partial"), gradient("centred")
    np.testing.assert_array_equal(first_TE, second_TE)
    inside = used.numpy()
    np.testing.assert_allclose(centred_TE[inside], partial_TE[inside] - partial_TE[inside].mean(0), atol=1e-6)
    assert abs(centred_TE.sum(0)).max() < 1e-5 < abs(partial_TE.sum(0)).max()
    assert not centred_TE[~inside].any()
    assert not weigh("detach", skewed(40, 6).requires_grad_()).requires_grad


@by_polytope
def test_before_selects_by_what_one_sweep_on_the_batch_itself_gives(polytope):
    start_E = torch.tensor([0.4, -0.1, 0.3, 0.0, -0.5, -0.1])
    gate = carried_gate(polytope, 2, start_E, refresh="before")
    batches = [skewed(40, 6), skewed(24, 6, seed=1)]
    for logits in batches:
        z_TE = array(logits)
        own_E = swept(polytope, [z_TE], array(start_E), 2, 0.5)
        expected_TE = top_k(z_TE + own_E, softmax(z_TE, axis=1), 2)
        np.testing.assert_allclose(array(routed(gate, logits)[0]), expected_TE, rtol=1e-5)
        assert not np.array_equal(expected_TE, top_k(z_TE + array(start_E), softmax(z_TE, axis=1), 2))
    gate.commit()
    expected_E = swept(polytope, [array(logits) for logits in batches], array(start_E), 2, 0.5)
    np.testing.assert_allclose(array(potentials_of(gate)), expected_E, rtol=0, atol=1e-5)


@by_polytope
@pytest.mark.parametrize("refresh", ["after", "before"])
def test_a_transport_step_commits_the_mean_of_its_batches_solutions_weighed_by_their_tokens(polytope, refresh):
    gate = carried_gate(polytope, 2, refresh=refresh, probability=1.0, solver=EXACT)
    batches = [skewed(48, 6), skewed(24, 6, seed=1)]
    weights = [array(routed(gate, logits)[0]) for logits in batches]
    routed(gate, skewed(9, 6), torch.zeros(9))
    gate.commit()
    solved = [_solved(polytope, array(logits)) for logits in batches]
    np.testing.assert_allclose(
        array(potentials_of(gate)), np.average(solved, axis=0, weights=[48, 24]), rtol=0, atol=1e-4
    )
    for weights_TE, logits, own_E in zip(weights, batches, solved, strict=True):
        z_TE = array(logits)
        select_TE = z_TE + (own_E if refresh == "before" else 0)
        np.testing.assert_allclose(weights_TE, top_k(select_TE, softmax(z_TE, axis=1), 2), rtol=1e-5)


def _solved(polytope, scores_TE):
    """Potentials at which the columns of the plan are even, mean zero: POT's, or by many sweeps."""
    tokens, experts = scores_TE.shape
    if polytope == "mass":
        _, log = ot.sinkhorn(
            np.ones(tokens), np.full(experts, tokens / experts), -scores_TE, 0.5, stopThr=1e-12, log=True
        )
        potentials_E = 0.5 * np.log(log["v"])
        return potentials_E - potentials_E.mean()
    potentials_E = np.zeros(experts)
    for _ in range(60):
        potentials_E = swept(polytope, [scores_TE], potentials_E, 2, 0.5, damping=1.5)
    np.testing.assert_allclose(
        plan_of(polytope, scores_TE, potentials_E, 2, 0.5).sum(0), 2 * tokens / experts, rtol=1e-6
    )
    return potentials_E


@by_polytope
@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_changes_nothing_and_routes_by_the_potentials_if_told_to(polytope, frozen):
    start_E = torch.tensor([-1.5, 0.2, -0.7, 0.4, 0.3, 1.3])
    gate = carried_gate(polytope, 2, start_E, eval_potentials=frozen, refresh="before", probability=1.0).eval()
    logits = skewed(40, 6)
    z_TE = array(logits)
    expected_TE = top_k(z_TE + (array(start_E) if frozen else 0), softmax(z_TE, axis=1), 2)
    for _ in range(2):
        np.testing.assert_allclose(array(routed(gate, logits)[0]), expected_TE, rtol=1e-5)
        gate.commit()
    assert torch.equal(potentials_of(gate), start_E)


@by_polytope
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_what_is_not_finite_is_never_committed(polytope, bad, probability):
    gate = carried_gate(polytope, probability=probability)
    logits = skewed(40, 6)
    logits[3] = bad
    logits[5, 2] = bad
    for batch in (logits, skewed(40, 6)):
        routed(gate, batch)
        gate.commit()
        assert torch.isfinite(potentials_of(gate)).all()
    assert potentials_of(gate).abs().max() > 0.1, "the next step goes on"


@by_polytope
@pytest.mark.parametrize("transport", [False, True])
def test_a_step_of_padding_alone_changes_nothing(polytope, transport):
    gate = carried_gate(polytope, probability=float(transport), solver=EXACT)
    routed(gate, skewed(40, 6))
    gate.commit()
    before = potentials_of(gate).clone()
    routed(gate, skewed(40, 6, seed=2), torch.zeros(40))
    gate.commit()
    torch.testing.assert_close(potentials_of(gate), before, rtol=0, atol=1e-6)


def test_carried_potentials_make_the_counts_even():
    gate, logits = carried_gate("capacity", 2, entropy=0.1), router_logits("clustered", 1024, 6)
    violations = []
    for _ in range(61):
        counts = routed(gate, logits)[2]
        violations.append(float(max_violation(counts.float())))
        gate.commit()
    assert violations[0] > 1
    assert violations[-1] < 0.3


@pytest.mark.parametrize(
    ("polytope", "k", "offset"),
    [("mass", 2, -20.0), *(("capacity", *case) for case in [(1, -20.0), (2, -20.0), (3, -20.0), (4, 20.0), (5, 20.0)])],
)
def test_an_expert_beyond_what_the_plan_resolves_comes_back(polytope, k, offset):
    """200 entropies from the others nobody chooses it, or everybody, to the last digit of the column sum.

    The other ways a sweep goes by `xi log(E / k)` a step, too slow to be seen here.
    """
    gate, logits = carried_gate(polytope, k, entropy=0.1), torch.randn(200, 6)
    logits[:, 2] += offset
    for _ in range(60):
        counts = routed(gate, logits)[2]
        gate.commit()
    assert max_violation(counts.float()) < 0.4
    assert 0 < counts[2] < 200


@by_polytope
@pytest.mark.parametrize("refresh", ["after", "before"])
@pytest.mark.parametrize("k", [2, 4])
def test_padding_alone_gives_finite_gradients_also_where_the_plan_weighs(polytope, refresh, k):
    gate, logits = carried_gate(polytope, k, refresh=refresh, weights="plan"), skewed(40, 6).requires_grad_()
    routed(gate, logits, torch.zeros(40))[0].sum().backward()
    assert not logits.grad.any()
    gate.commit()
    assert potentials_of(gate).abs().max() < 1e-6
