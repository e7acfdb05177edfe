import pytest
import torch

import ssr_deepspeed.ot.sinkhorn
import ssr_deepspeed.routing.plan
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.kernels import fused_columns, fused_route

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def run(gate, x, goal):
    gate.zero_grad()
    output = gate(x, torch.arange(60) % 7 != 0, True)
    (output[5] * goal).sum().backward()
    return [*output[3:], gate.wg.weight.grad.clone()]


def on_kernels(monkeypatch):
    """Have the kernels used where they fit; the names of those called, as they are."""
    calls = []

    def counted(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options)

        return call

    for module, name, function in (
        (ssr_deepspeed.ot.sinkhorn, "fused_columns", fused_columns),
        (ssr_deepspeed.routing.plan, "fused_route", fused_route),
    ):
        monkeypatch.setattr(module, "usable", lambda *arguments: True)
        monkeypatch.setattr(module, name, counted(function))
    return calls


@pytest.mark.parametrize(("cost", "entropy"), [("linear", 1.0), ("linear", 0.3), ("softmax", 0.2)])
@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_a_gate_on_kernels_is_the_gate_on_torch(k, transport, cost, entropy, monkeypatch):
    config = SSRConfig(rule="ssr", cost=cost, entropy=entropy, gradient="implicit")
    torch.manual_seed(3)
    gate = SSRGate(16, 8, k, 1.0, 1.0, 4, config=config)
    gate.ssr.transport = transport
    x, goal = torch.randn(60, 16), torch.randn(k, 60)
    monkeypatch.setattr(ssr_deepspeed.ot.sinkhorn, "readable", lambda tensor: False)
    plain = run(gate, x, goal)
    calls = on_kernels(monkeypatch)
    fused = run(gate, x, goal)
    for mine, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert ("fused_columns" in calls) == transport
    # One choice by a softmax of the logits' softmax reads two matrices.
    assert ("fused_route" in calls) == (not (k == 1 and transport and cost == "softmax"))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "block",
    [
        {"rule": "carried", "carried": {"polytope": "mass"}},
        {"rule": "carried"},
        {"rule": "carried", "cost": "softmax", "weights": "plan"},
        {"rule": "quantile"},
        {"rule": "s_base"},
    ],
)
def test_a_rule_on_kernels_is_the_rule_on_torch(block, k, monkeypatch):
    goal = torch.randn(k, 60)
    inputs = [torch.randn(60, 16) for _ in range(3)]

    def train():
        torch.manual_seed(3)
        gate = SSRGate(16, 8, k, 1.0, 1.0, 4, config=SSRConfig.from_dict({"probability": 0.0, **block}))
        outputs = []
        for x in inputs:
            outputs += run(gate, x, goal)
            gate.commit()
        return [*outputs, *gate.ssr.rule.state.values()]

    plain = train()
    calls = on_kernels(monkeypatch)
    for mine, theirs in zip(train(), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert "fused_route" in calls
