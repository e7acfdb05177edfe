"""DeepSpeed's own gate as the oracle: with SSR off, training with our gate is training with theirs.

Where `TopKGate` and our gate, under rule `none` or on a softmax step of rule `ssr`, do the same, and where not:

    experts      the k largest logits, but `TopKGate` draws the second of two unless `top2_2nd_expert_sampling=False`
    weights      equal: the softmax probability for k = 1, else renormalised over the routes that survive
    capacity     equal, and rounded up to the tensor-parallel size in ours
    drops        k > 2: equal, the most probable stay. k = 1: `TopKGate` draws who stays, or any does.
                 k = 2: the earliest tokens stay, first choices before second ones. In ours the most probable stay
    evaluation   equal where the draws above are off: `TopKGate` draws in evaluation too
    l_aux        zero in ours. Rule `auxiliary` gives theirs for k = 1 and k > 2; for two experts they count first
                 choices alone, ours both
    padding      `TopKGate` heeds `used_token` for k = 1 only

Routes and loads are equal to the bit. Weights are not: ours come from `exp(z - logsumexp(z))` of the chosen experts,
theirs from the softmax of all, and an expert's tokens lie in other slots of its buffer, so that sums over them
round otherwise. Both are fp32.
"""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

import ssr_deepspeed
from tests.gloo import run_ranks
from tests.hosts.test_rules import PLAIN, WithLoss, _batch
from tests.toy import EXPERTS, build_engine

OFF = {"use_rts": False, "top2_2nd_expert_sampling": False}
ROOM = {"drop": True, "capacity_factor": float(EXPERTS), "eval_capacity_factor": float(EXPERTS)}
TIGHT = {"drop": True, "capacity_factor": 1.0, "eval_capacity_factor": 1.0}
NONE, SOFTMAX = {"rule": "none"}, {"rule": "ssr", "probability": 0.0}
# our block, k, ZeRO stage, weight of l_aux, the model's settings
CASES = [
    (NONE, 1, 0, 0.0, {}),
    (SOFTMAX, 1, 1, 0.0, {**ROOM, "use_residual": True}),
    (SOFTMAX, 2, 0, 0.0, {"use_residual": True}),
    (NONE, 2, 2, 0.0, ROOM),
    (NONE, 3, 1, 0.0, {"use_residual": True}),
    (SOFTMAX, 4, 2, 0.0, {}),
    ({"rule": "auxiliary"}, 1, 0, 0.1, {}),
    ({"rule": "auxiliary"}, 3, 2, 0.1, {}),
    (SOFTMAX, 3, 0, 0.0, TIGHT),
]
if Version(deepspeed.__version__) < Version("0.19.0"):
    # `TopKGate` for k > 2 dropped nearly all routes, or failed where none may be dropped.
    CASES = [case for case in CASES if case[1] <= 2]


def _train(block, k, zero, weight, settings):
    """Losses and loads by step, what evaluation gives, and the weights at the end."""
    rank = dist.get_rank()
    model = WithLoss(2, rank, k=k, **OFF, **settings)
    engine = build_engine(model, block, zero=zero, optimizer=PLAIN, zero_allow_untested_optimizer=True)
    losses, loads = [], []
    for step in range(4):
        out, l_aux = engine(_batch(step, slice(rank, rank + 1)))
        loss = out.square().mean() + weight * l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        loads.append([layer.deepspeed_moe.exp_counts.tolist() for layer in model.layers])
    engine.eval()
    with torch.no_grad():
        evaluated = engine(_batch(9, slice(rank, rank + 1)))[0]
    return losses, loads, evaluated, {name: weight.detach().clone() for name, weight in model.named_parameters()}


# where they differ: the choice of experts, the auxiliary loss of two, and whom a full expert keeps
APART = [({"rule": "s_base"}, 2, 0, 0.0, {}), ({"rule": "auxiliary"}, 2, 0, 0.1, {}), (NONE, 2, 0, 0.0, TIGHT)]


def _both():
    ssr_deepspeed.install()
    return [(_train(block, *rest), _train(None, *rest)) for block, *rest in CASES + APART]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By rank and case: what our gate gave and what theirs did, on two expert-parallel ranks."""
    return run_ranks(2, _both, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case][:3])))
def test_training_with_ssr_off_is_training_with_topkgate(case, found):
    for ours, theirs in (pairs[case] for pairs in found):
        assert ours[1] == theirs[1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        if CASES[case][-1] is TIGHT:
            assert max(max(load) for load in ours[1][0]) > 24 * 3 / EXPERTS, "it dropped"


@pytest.mark.parametrize("case", range(len(APART)), ids=lambda case: APART[case][0]["rule"])
def test_where_the_rules_differ_training_does(case, found):
    for ours, theirs in (pairs[len(CASES) + case] for pairs in found):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
