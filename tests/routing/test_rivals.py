import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp, softmax

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.routing import make_rule
from tests.gloo import run_ranks
from tests.routing.formulas import array, quantile_bias, routed, rule_gate, skewed, top_k


def uneven_share(rows_TE, k):
    return np.bincount(np.argsort(-rows_TE, axis=1)[:, :k].ravel(), minlength=rows_TE.shape[1]) / (len(rows_TE) * k)


@pytest.mark.parametrize("rule", ["auxiliary", "global_auxiliary"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_the_auxiliary_loss_is_experts_times_share_times_mean_probability(rule, padded, k):
    gate, logits = rule_gate(rule, k), skewed(40, 6).requires_grad_()
    used = torch.arange(40) % 3 != 0 if padded else torch.ones(40, dtype=torch.bool)
    weights_TE, l_aux, _ = routed(gate, logits, used if padded else None)
    rows_TE = array(logits)[used.numpy()]
    share_E, probability_TE = uneven_share(rows_TE, k), softmax(rows_TE, axis=1)
    assert l_aux.item() == pytest.approx(6 * (share_E * probability_TE.mean(0)).sum())
    assert l_aux.item() > 1.2
    (slope,) = torch.autograd.grad(l_aux, logits)
    # d P_j / d Z_il = P_il (delta_jl - P_ij) / T, and the shares are constants.
    expected_TE = 6 * probability_TE * (share_E - probability_TE @ share_E[:, None]) / len(rows_TE)
    np.testing.assert_allclose(array(slope)[used.numpy()], expected_TE, rtol=0, atol=1e-7)
    assert not array(slope)[~used.numpy()].any()
    z_TE = array(logits)
    np.testing.assert_allclose(
        array(weights_TE)[used.numpy()], top_k(z_TE, softmax(z_TE, axis=1), k)[used.numpy()], rtol=1e-5
    )


def _global_loss():
    rank = torch.distributed.get_rank()
    gate = rule_gate("global_auxiliary")
    gate.ssr.data_parallel_group = torch.distributed.group.WORLD
    return routed(gate, skewed(40, 6) if rank == 0 else -skewed(24, 6, seed=1))[1].item()


def test_the_global_loss_takes_its_shares_from_all_ranks(tmp_path):
    rows = [array(skewed(40, 6)), -array(skewed(24, 6, seed=1))]
    share_E = (uneven_share(rows[0], 2) * 40 + uneven_share(rows[1], 2) * 24) / 64
    expected = [6 * (share_E * softmax(rows_TE, axis=1).mean(0)).sum() for rows_TE in rows]
    assert run_ranks(2, _global_loss, folder=tmp_path) == pytest.approx(expected)


@pytest.mark.parametrize("padded", [False, True])
def test_the_z_loss_is_the_mean_square_of_the_log_partition(padded):
    gate, logits = rule_gate("z"), skewed(40, 6)
    used = torch.arange(40) % 3 != 0 if padded else torch.ones(40, dtype=torch.bool)
    l_aux = routed(gate, logits, used if padded else None)[1]
    expected = (logsumexp(array(logits)[used.numpy()], axis=1) ** 2).mean()
    assert l_aux.item() == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["auxiliary", "global_auxiliary", "z"])
def test_a_loss_without_tokens_is_zero_and_evaluation_has_none(rule):
    gate, logits = rule_gate(rule), skewed(40, 6)
    assert routed(gate, logits, torch.zeros(40))[1].item() == 0
    assert routed(gate, torch.randn(0, 6))[1].item() == 0
    assert routed(gate.eval(), logits)[1].item() == 0


@pytest.mark.parametrize("k", [1, 2])
def test_noise_has_the_scale_softplus_of_the_input_times_its_weight(k):
    gate, logits, x = rule_gate("noisy", k), skewed(40, 6), skewed(40, 8, seed=1)
    gate.ssr.rule.state["noise"].data.copy_(torch.randn(6, 8))
    torch.manual_seed(7)
    weights_TE = routed(gate, logits, None, x)[0]
    torch.manual_seed(7)
    scale_TE = np.log1p(np.exp(array(x) @ array(gate.ssr.rule.state["noise"]).T))
    noisy_TE = array(logits) + array(torch.randn(40, 6)) * scale_TE
    np.testing.assert_allclose(array(weights_TE), top_k(noisy_TE, softmax(noisy_TE, axis=1), k), rtol=1e-3, atol=1e-5)
    z_TE = array(logits)
    np.testing.assert_allclose(array(routed(gate.eval(), logits)[0]), top_k(z_TE, softmax(z_TE, axis=1), k), rtol=1e-5)


def test_the_noises_weight_learns_by_adam_on_the_gradient_of_the_step():
    """Two micro-batches a step; the gradient by hand through `N softplus(x W)`."""
    gate, goal_TE = rule_gate("noisy", 2, rate=0.05), torch.randn(40, 6)
    other_EM = torch.zeros(6, 8, requires_grad=True)
    adam = torch.optim.Adam([other_EM], lr=0.05)
    for step in range(3):
        gradient_EM = np.zeros((6, 8))
        for part in range(2):
            logits, x = skewed(40, 6, seed=step), skewed(40, 8, seed=10 + part)
            torch.manual_seed(10 * step + part)
            # Read, not drawn again: what arrives at the noisy logits is what arrives at the logits.
            logits.requires_grad_()
            (routed(gate, logits, None, x)[0] * goal_TE).sum().backward()
            torch.manual_seed(10 * step + part)
            slope_TE = array(logits.grad) * array(torch.randn(40, 6)) * expit(array(x) @ array(other_EM).T)
            gradient_EM += slope_TE.T @ array(x)
        before = gate.ssr.rule.state["noise"].clone()
        gate.commit()
        other_EM.grad = torch.from_numpy(gradient_EM).float()
        adam.step()
        torch.testing.assert_close(gate.ssr.rule.state["noise"], other_EM.detach(), rtol=1e-3, atol=1e-5)
        assert not torch.equal(gate.ssr.rule.state["noise"], before)
    assert gate.ssr.rule.state["steps"].item() == 3
    assert not [name for name in gate.state_dict() if name != "wg.weight"]


def test_adam_reads_nothing_from_the_device():
    """On the meta device nothing can be read."""
    rule = make_rule(SSRConfig(rule="noisy"), 6, 8, 2, torch.device("meta"))
    rule.gather()
    rule.commit(rule.sums, False)
    assert rule.state["steps"].item() == 1


def test_a_noise_gradient_that_is_not_finite_moves_nothing():
    gate, x = rule_gate("noisy"), skewed(40, 8)
    logits = skewed(40, 6).requires_grad_()
    (routed(gate, logits, None, x)[0].sum() * float("nan")).backward()
    gate.commit()
    assert not gate.ssr.rule.state["noise"].any()


@pytest.mark.parametrize("k", [1, 2])
def test_the_loss_free_bias_moves_by_its_rate_towards_even_loads(k):
    gate = rule_gate("loss_free", k, rate=0.03)
    bias_E = np.zeros(6)
    used = torch.arange(24) % 3 != 0
    for step in range(4):
        load_E = np.zeros(6)
        for logits, mask in ((skewed(40, 6, seed=step), None), (skewed(24, 6, seed=9 + step), used)):
            z_TE = array(logits)
            probability_TE = softmax(z_TE, axis=1)
            expected_TE = top_k(probability_TE + bias_E, probability_TE, k)
            expected_TE[~used.numpy() if mask is not None else []] = 0
            np.testing.assert_allclose(array(routed(gate, logits, mask)[0]), expected_TE, rtol=1e-5)
            load_E += (expected_TE > 0).sum(0)
        bias_E += 0.03 * np.sign(load_E.mean() - load_E)
        gate.commit()
        np.testing.assert_allclose(array(gate.ssr.rule.state["bias"]), bias_E, atol=1e-7)
    assert np.ptp(bias_E) > 0.1


@pytest.mark.parametrize("rule", ["loss_free", "quantile"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_bias_selects_in_evaluation_if_told_to_and_stays(rule, frozen):
    gate, logits = rule_gate(rule, 2, eval_potentials=frozen).eval(), skewed(40, 6)
    gate.ssr.rule.state["bias"].copy_(torch.linspace(-0.3, 0.3, 6))
    before = gate.ssr.rule.state["bias"].clone()
    probability_TE = softmax(array(logits), axis=1)
    expected_TE = top_k(probability_TE + (array(before) if frozen else 0), probability_TE, 2)
    np.testing.assert_allclose(array(routed(gate, logits)[0]), expected_TE, rtol=1e-5)
    gate.commit()
    assert torch.equal(gate.ssr.rule.state["bias"], before)


@pytest.mark.parametrize("tokens", [48, 41, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_quantile_balancing_is_its_formula_over_several_steps_with_padding_or_without(k, tokens):
    bare, padded, bias_E = rule_gate("quantile", k), rule_gate("quantile", k), np.zeros(6)
    used = torch.arange(2 * tokens) % 2 == 0
    for step in range(4):
        logits = skewed(tokens, 6, seed=step)
        score_TE = softmax(array(logits), axis=1)
        expected_TE = top_k(score_TE + bias_E, score_TE, k)
        if k < 6:
            bias_E = quantile_bias(score_TE, bias_E, k)
        among = torch.randn(2 * tokens, 6) * 9
        among[used] = logits
        np.testing.assert_allclose(array(routed(bare, logits)[0]), expected_TE, rtol=1e-5)
        np.testing.assert_allclose(array(routed(padded, among, used)[0][used]), expected_TE, rtol=1e-5)
        for gate in (bare, padded):
            gate.commit()
            np.testing.assert_allclose(array(gate.ssr.rule.state["bias"]), bias_E, rtol=0, atol=1e-6)
    assert (k == 6) != bool(bare.ssr.rule.state["bias"].any())


def test_quantile_balancing_averages_the_biases_of_a_steps_passes():
    both = rule_gate("quantile")
    biases = []
    for seed in range(2):
        alone = rule_gate("quantile")
        routed(alone, skewed(40, 6, seed=seed))
        routed(both, skewed(40, 6, seed=seed))
        alone.commit()
        biases.append(alone.ssr.rule.state["bias"])
    routed(both, skewed(9, 6), torch.zeros(9))
    both.commit()
    torch.testing.assert_close(both.ssr.rule.state["bias"], torch.stack(biases).mean(0))
