"""Routers that return weights and indices: what SSR does to them, against each family's own arithmetic."""

import copy
import pickle

import pytest
import torch

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.hosts.inspection import HostContract, find_token_routers, inspect_host
from ssr_deepspeed.hosts.routers import Found
from ssr_deepspeed.monitor import LoadMonitor
from ssr_deepspeed.token_router import Padding, TokenRouter, refusal
from tests.hosts.families import FAMILIES, tiny_model

TokenChoiceTopKRouter = pytest.importorskip(
    "deepspeed.moe.ep_router", reason="AutoEP came with deepspeed 0.19.2"
).TokenChoiceTopKRouter


def take_over(model, block):
    """All routers of the model, SSR's now."""
    served, _ = find_token_routers(model)
    config = SSRConfig.from_dict(block)
    padding = Padding()
    return [
        TokenRouter.adopt(module, contract, config, layer, padding=padding)
        for layer, (module, contract) in enumerate(served.values())
    ]


def autoep_router(**changes):
    settings = {
        "dim": 16,
        "num_experts": 8,
        "num_expert_groups": None,
        "num_limited_groups": None,
        "top_k": 2,
        "score_func": "softmax",
        "route_norm": True,
        "route_scale": 1.0,
        "gate_bias": False,
    }
    return TokenChoiceTopKRouter(**{**settings, **changes})


@pytest.mark.parametrize("family", list(FAMILIES))
def test_evaluation_and_generation_of_every_family_stay_the_same_to_the_bit(family):
    model = tiny_model(family)
    tokens = torch.randint(3, 64, (2, 12))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        written = model.generate(tokens, max_new_tokens=4, do_sample=False)
    names = list(model.state_dict())
    assert len(take_over(model, {"rule": "ssr", "probability": 1.0})) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=0, atol=0)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), written)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_softmax_step_trains_every_family_as_without_ssr_to_the_bit(family):
    model = tiny_model(family).train()
    tokens = torch.randint(3, 64, (2, 12))
    other = copy.deepcopy(model)
    take_over(other, {"rule": "ssr", "probability": 0.0})
    for one in (model, other):
        one(input_ids=tokens, labels=tokens).loss.backward()
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_transport_step_balances_every_family_and_gives_its_router_a_gradient(family):
    model = tiny_model(family).train()
    tokens = torch.randint(3, 64, (4, 64))
    alone = [int(router.loads[-1].max()) for router in _watched(copy.deepcopy(model), tokens)]
    routers = take_over(model, {"rule": "capacity", "probability": 1.0, "entropy": 0.05, "weights": "shifted"})
    model(input_ids=tokens, labels=tokens).loss.backward()
    fullest = [int(router.ssr.demand_E.max()) for router in routers]
    if FAMILIES[family].get("n_group", 1) == 1:  # groups of experts limit what potentials can move
        assert sum(fullest) < sum(alone), (fullest, alone)
    for router in routers:
        assert router.ssr.solution is not None
        assert router.router_weight.grad.abs().max() > 0


class _Watch:
    def __init__(self, contract):
        self.contract, self.loads = contract, []

    def __call__(self, module, inputs, output):
        self.loads.append(torch.bincount(output[self.contract.indices_at].flatten(), minlength=self.contract.experts))


def _watched(model, tokens):
    watches = []
    for module, contract in find_token_routers(model)[0].values():
        watches.append(_Watch(contract))
        module.register_forward_hook(watches[-1])
    model(input_ids=tokens)
    return watches


def _route(router, hidden):
    """Logits, weights and indices of a router, best first."""
    output = router(hidden)
    weights_TK, indices_TK = output[router.contract.weights_at], output[router.contract.indices_at]
    order = weights_TK.detach().argsort(dim=1, descending=True, stable=True)
    return output, weights_TK.gather(1, order), indices_TK.gather(1, order)


def test_potentials_enter_mixtrals_softmax_and_its_norm():
    model = tiny_model("mixtral").train()
    router = take_over(model, {"rule": "ssr", "probability": 1.0, "entropy": 0.5})[0]
    hidden = torch.randn(96, 32)
    output, weights_TK, indices_TK = _route(router, hidden)
    logits = hidden @ router.weight.T
    plan = torch.softmax((logits + router.ssr.solution.potentials) / 0.5, dim=1)
    top = torch.topk(plan, 2, dim=1)
    assert torch.equal(indices_TK, top.indices)
    torch.testing.assert_close(weights_TK, top.values / top.values.sum(1, keepdim=True))
    torch.testing.assert_close(output[0], logits)


def test_deepseek_v3_keeps_its_sigmoid_groups_bias_and_scale():
    model = tiny_model("deepseek_v3").train()
    router = take_over(model, {"rule": "s_base", "entropy": 1.0})[0]
    router.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    hidden = torch.randn(96, 32)
    _, weights_TK, indices_TK = _route(router, hidden)
    logits = hidden @ router.weight.T
    scores = torch.sigmoid(logits + router.ssr.solution.potentials) + router.e_score_correction_bias
    best_groups = scores.view(96, 4, 2).sum(2).topk(2, dim=1).indices
    allowed = torch.zeros(96, 4).scatter(1, best_groups, 1.0).repeat_interleave(2, dim=1)
    chosen = scores.masked_fill(allowed == 0, -torch.inf).topk(2, dim=1).indices
    assert torch.equal(indices_TK.sort(1).values, chosen.sort(1).values)
    own = torch.sigmoid(logits).gather(1, indices_TK)
    torch.testing.assert_close(weights_TK, 2.5 * own / own.sum(1, keepdim=True))


@pytest.mark.parametrize("rule", ["s_base", "loss_free", "quantile"])
def test_a_rule_that_only_selects_leaves_the_weights_to_the_hosts_own_scores(rule):
    router = autoep_router(route_norm=False, route_scale=3.0).train()
    TokenRouter.adopt(router, inspect_host(router), SSRConfig.from_dict({"rule": rule, "rate": 0.3}), 0)
    for _ in range(3):
        hidden = torch.randn(64, 16) + 0.3
        scores_TK, indices_TK, counts_E = router(hidden)
        router.commit()
    assert not torch.equal(indices_TK.sort(1).values, torch.topk(router.gate(hidden), 2).indices.sort(1).values)
    expected = 3.0 * torch.softmax(router.gate(hidden), dim=1).gather(1, indices_TK)
    torch.testing.assert_close(scores_TK, expected)
    assert torch.equal(counts_E.long(), torch.bincount(indices_TK.flatten(), minlength=8))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_func": "sigmoid", "route_norm": False, "route_scale": 2.5},
        {"num_expert_groups": 4, "num_limited_groups": 2},
        {"num_expert_groups": 4, "num_limited_groups": 2, "group_score_func": "max", "gate_bias": True},
    ],
)
def test_autoeps_counts_equal_its_indices_and_hooks_on_its_gate_see_the_raw_logits_once(settings):
    router = autoep_router(**settings).train()
    contract = inspect_host(router)
    assert isinstance(contract, HostContract)
    TokenRouter.adopt(router, contract, SSRConfig(rule="ssr", probability=1.0), 0)
    seen = []
    router.gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hidden = torch.randn(64, 16, requires_grad=True)
    scores_TK, indices_TK, counts_E = router(hidden, torch.zeros(8))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], torch.nn.functional.linear(hidden, router.gate.weight, router.gate.bias))
    assert torch.equal(counts_E.long(), torch.bincount(indices_TK.flatten(), minlength=8))
    assert scores_TK.dtype == torch.float32
    scores_TK.square().sum().backward()
    assert router.gate.weight.grad.abs().max() > 0


def test_a_router_is_found_under_another_default_device():
    router = autoep_router()
    model = tiny_model("mixtral")
    expected = inspect_host(router), find_token_routers(model)
    assert isinstance(expected[0], HostContract)
    with torch.device("meta"):
        assert (inspect_host(router), find_token_routers(model)) == expected


def test_weights_keep_the_hosts_dtype():
    for family in ("mixtral", "qwen3_moe", "gpt_oss", "jamba"):
        model = tiny_model(family).to(torch.bfloat16).train()
        hidden = torch.randn(32, 32, dtype=torch.bfloat16)
        module, contract = next(iter(find_token_routers(model)[0].values()))
        before = [value.dtype for value in module(hidden)]
        TokenRouter.adopt(module, contract, SSRConfig(rule="ssr", probability=1.0), 0)
        assert [value.dtype for value in module(hidden)] == before, family


def test_padding_of_the_attention_mask_is_neither_balanced_nor_counted():
    model = tiny_model("mixtral").train()
    routers = take_over(model, {"rule": "ssr", "probability": 1.0})
    model.register_forward_pre_hook(routers[0].padding.read, with_kwargs=True)
    tokens = torch.randint(3, 64, (2, 16))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, 10:] = 0
    model(input_ids=tokens, attention_mask=mask)
    assert [int(router.ssr.demand_E.sum()) for router in routers] == [2 * 26] * 2
    potentials = routers[0].ssr.solution.potentials
    tokens[0, 10:] = 63 - tokens[0, 10:]
    model(input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(routers[0].ssr.solution.potentials, potentials)
    model(input_ids=tokens)
    assert int(routers[0].ssr.demand_E.sum()) == 2 * 32
    model(tokens, mask)
    assert int(routers[0].ssr.demand_E.sum()) == 2 * 26


def test_a_router_is_copied_and_pickled_as_the_hosts_own_and_released_to_it():
    model = tiny_model("qwen3_moe")
    host = type(model.model.layers[0].mlp.gate)
    before = set(vars(model.model.layers[0].mlp.gate))
    router = take_over(model, {"rule": "carried"})[0]
    monitor = LoadMonitor(["router"], [8], 1, torch.device("cpu"))
    handle = Found(router, router.contract).count(monitor, 0, router.padding)
    assert isinstance(router, host)
    assert type(router) is not host
    for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert type(other) is host
        assert torch.equal(other.weight, router.weight)
        assert len(other.train()(torch.randn(3, 32))) == 3
    assert not monitor.end_step(0).demand_WLE.any(), "a copy is not counted"
    handle.remove()
    assert type(router.release()) is host
    assert set(vars(router)) == before


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"rule": "auxiliary"}, "works by a loss"),
        ({"rule": "z"}, "works by a loss"),
        ({"rule": "carried", "overflow": "next"}, "drops nothing"),
    ],
)
def test_what_such_a_host_cannot_do_is_refused_with_a_reason(block, words):
    assert words in refusal(SSRConfig.from_dict(block))
    assert refusal(SSRConfig()) is None


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: (torch.nn.functional.linear(x, self.weight),) * 3, "not weights"),
        (lambda self, x: torch.nn.functional.linear(x, self.weight), "returns a Tensor"),
        (lambda self, x: (x, *torch.topk(x[:, :8], 2)), "computes logits 0 times"),
        (
            lambda self, x: (x, *torch.topk(-torch.nn.functional.linear(x, self.weight), 2)),
            "does not choose the experts with the largest logits",
        ),
        (
            lambda self, x: (
                x,
                *(part[:, :2] for part in torch.nn.functional.linear(x, self.weight).sort(descending=True)),
            ),
            "does not take what one top-k",
        ),
        (lambda self, x, ids: ids.missing, "does not take hidden states alone"),
    ],
)
def test_a_module_that_only_looks_like_a_router_is_left_alone_with_a_reason(forward, words):
    kind = type("OddRouter", (torch.nn.Linear,), {"forward": forward})
    model = torch.nn.ModuleDict({"gate": kind(16, 8, bias=False), "experts": torch.nn.Identity()})
    served, refused = find_token_routers(model)
    assert not served
    assert words in refused["gate"]


def test_looking_at_a_model_leaves_it_and_the_random_numbers_alone():
    model = tiny_model("deepseek_v3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_token_routers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_compiled_model_routes_and_trains_as_the_plain_one(family):
    model = tiny_model(family).train()
    other = copy.deepcopy(model)
    routers, compiled_routers = (take_over(one, {"rule": "ssr", "probability": 1.0}) for one in (model, other))
    compiled = torch.compile(other, backend="eager")
    tokens = torch.randint(3, 64, (2, 12))
    losses = [one(input_ids=tokens, labels=tokens).loss for one in (model, compiled)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(compiled_routers, routers, strict=True):
        assert torch.equal(mine.ssr.demand_E, theirs.ssr.demand_E)
        assert mine.ssr.solution is not None
        torch.testing.assert_close(mine.router_weight.grad, theirs.router_weight.grad)
