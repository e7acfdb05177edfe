import contextlib
import functools
import io
import json
import math

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.runtime.engine import DeepSpeedEngine

import ssr_deepspeed
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.routing import is_transport_step
from tests.gloo import run_ranks
from tests.toy import EXPERTS, WIDTH, ToyModel, build_engine, global_name


def _gates(engine):
    return [module for module in engine.module.modules() if isinstance(module, TopKGate)]


def _install_swap_uninstall():
    originals = {name: vars(DeepSpeedEngine)[name] for name in ("__init__", "forward", "_take_model_step")}
    ssr_deepspeed.install()
    ssr_deepspeed.install()
    model = ToyModel()
    weights = [layer.deepspeed_moe.gate.wg.weight for layer in model.layers]
    values = [weight.detach().clone() for weight in weights]
    engine = build_engine(model, {"rule": "ssr", "probability": 1.0})
    assert [type(gate) for gate in _gates(engine)] == [SSRGate] * 2
    assert [gate.wg.weight for gate in _gates(engine)] == weights
    assert all(torch.equal(a, b) for a, b in zip(weights, values, strict=True))
    assert engine.gate_modules == _gates(engine)
    untouched = build_engine(ToyModel(), None)
    assert [type(gate) for gate in _gates(untouched)] == [TopKGate] * 2
    keys = list(untouched.module.state_dict())
    assert list(engine.module.state_dict()) == keys
    ssr_deepspeed.uninstall()
    assert {name: vars(DeepSpeedEngine)[name] for name in originals} == originals
    assert [type(gate) for gate in _gates(engine)] == [TopKGate] * 2
    engine.backward(engine(torch.randn(1, 8, WIDTH)).sum())
    engine.step()
    assert [type(gate) for gate in _gates(build_engine(ToyModel(), {}))] == [TopKGate] * 2


def test_installing_swaps_gates_in_place_and_uninstalling_restores_everything(tmp_path):
    run_ranks(1, _install_swap_uninstall, folder=tmp_path)


def _wrapped_by_another():
    ssr_deepspeed.install()
    ours = DeepSpeedEngine.forward
    DeepSpeedEngine.forward = lambda self, *args, **kwargs: ours(self, *args, **kwargs)
    with pytest.raises(RuntimeError, match=r"DeepSpeedEngine\.forward was wrapped again"):
        ssr_deepspeed.uninstall()
    DeepSpeedEngine.forward = ours
    ssr_deepspeed.uninstall()


def test_uninstalling_does_not_tear_down_another_plugins_wrapper(tmp_path):
    run_ranks(1, _wrapped_by_another, folder=tmp_path)


def _train(engine, steps, accumulation=1):
    seen = []
    for _ in range(steps):
        for _ in range(accumulation):
            out = engine(torch.randn(1, 8, WIDTH))
            seen.append([gate.ssr.transport for gate in _gates(engine)])
            engine.backward(out.square().mean())
            engine.step()
    return seen


def _coin_follows_the_engine(folder):
    ssr_deepspeed.install()
    block = {"rule": "ssr", "probability": 0.5, "per": "layer", "seed": 4}
    expected = [[is_transport_step(SSRConfig.from_dict(block), step, layer) for layer in (0, 1)] for step in range(12)]
    engine = build_engine(ToyModel(), block, zero=1, gradient_accumulation_steps=2)
    assert _train(engine, 8, accumulation=2) == [coins for coins in expected[:8] for _ in range(2)]
    engine.save_checkpoint(folder)
    fresh = build_engine(ToyModel(), block, zero=1, gradient_accumulation_steps=2)
    fresh.load_checkpoint(folder)
    assert _train(fresh, 4, accumulation=2) == [coins for coins in expected[8:] for _ in range(2)]
    engine.global_steps = 3
    engine(torch.randn(1, 8, WIDTH))
    assert [gate.ssr.transport for gate in _gates(engine)] == expected[3]


def test_the_coin_follows_global_steps_over_accumulation_and_checkpoints(tmp_path):
    run_ranks(1, _coin_follows_the_engine, str(tmp_path / "checkpoint"), folder=tmp_path)


def _checkpoints_cross(folder):
    """A TopKGate run's checkpoint loads strictly into an SSR run, and back."""
    ssr_deepspeed.install()
    for number, (first, second) in enumerate(((None, {}), ({}, None))):
        writer = build_engine(ToyModel(), first, zero=1)
        writer.save_checkpoint(f"{folder}/{number}")
        reader = build_engine(ToyModel(), second, zero=1)
        for weight in reader.module.parameters():
            weight.data.zero_()
        reader.load_checkpoint(f"{folder}/{number}", load_module_strict=True)
        for a, b in zip(writer.module.parameters(), reader.module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_checkpoints_load_strictly_both_ways(tmp_path):
    run_ranks(1, _checkpoints_cross, str(tmp_path), folder=tmp_path)


def _errors():
    ssr_deepspeed.install()
    rank = dist.get_rank()
    messages = []

    def refused(model, block):
        with pytest.raises(ValueError) as error:
            build_engine(model, block)
        assert not any(isinstance(module, SSRGate) for module in model.modules())
        messages.append(str(error.value))

    refused(ToyModel(2, rank), {"probability": 2})
    refused(ToyModel(2, rank), {"probability": 2} if rank == 1 else {})
    refused(ToyModel(2, rank), {"seed": rank})
    refused(ToyModel(2, rank), {} if rank == 0 else None)
    refused(ToyModel(2, rank), {"monitor": {"path": "/proc/nowhere/x.jsonl"}})
    refused(torch.nn.Sequential(torch.nn.Linear(4, 4)), {})
    model = ToyModel(2, rank)
    if rank == 1:
        gate = model.layers[1].deepspeed_moe.gate
        gate.forward = functools.partial(gate.forward)
    refused(model, {})
    with pytest.raises(ValueError, match='no "ssr" block'):
        ssr_deepspeed.initialize(model=torch.nn.Linear(2, 2), config={"train_micro_batch_size_per_gpu": 1})
    with pytest.raises(ValueError, match=r'"SSR".*did you mean "ssr"'):
        build_engine(ToyModel(2, rank), None, SSR={})
    return messages


def test_every_rank_raises_the_same_error_that_says_what_where_and_what_to_do(tmp_path):
    first, second = run_ranks(2, _errors, folder=tmp_path)
    assert first == second
    everywhere, on_one, differs, missing, unwritable, no_router, shadowed = first
    assert "ssr.probability = 2.0" in everywhere
    assert "rank 1" in on_one
    assert "ssr.probability = 2.0" in on_one
    assert "rank 1 differs from that of rank 0" in differs
    assert "rank 1 differs from that of rank 0" in missing
    assert "rank 0: cannot write ssr.monitor.path" in unwritable
    assert "no rank has a router" in no_router
    assert "rank 1: layers.1.deepspeed_moe.gate: the router has a forward of its own" in shadowed


def _step_on(ranks_batches, ep_size, block, k, zero):
    """Loss, outputs and gradients of one training pass; gradients by global parameter name."""
    rank = dist.get_rank()
    batch = ranks_batches[rank]
    engine = build_engine(ToyModel(ep_size, rank % ep_size, k), block, zero=zero)
    out = engine(batch)
    loss = out.square().mean()
    engine.backward(loss)
    gradients = {
        global_name(name, ep_size, rank % ep_size): deepspeed.utils.safe_get_full_grad(weight)
        if zero
        else weight.grad.clone()
        for name, weight in engine.module.named_parameters()
    }
    return loss.item(), out.detach(), gradients


_BLOCKS = [
    {"rule": "ssr", "probability": 0.0},
    {"rule": "ssr", "probability": 1.0, "scope": "data_parallel", "solver": {"tolerance": 1e-5, "max_iterations": 200}},
    {"rule": "ssr", "probability": 1.0, "scope": "expert_parallel", "cost": "softmax", "entropy": 0.3},
    {"rule": "ssr", "probability": 1.0, "scope": "data_parallel", "gradient": "implicit"},
    {"rule": "ssr", "probability": 1.0, "scope": "data_parallel", "solver": {"name": "newton", "tolerance": 1e-5}},
]
_CASES = [(block, k, 0) for block in _BLOCKS for k in (1, 2, 3)] + [(_BLOCKS[1], 2, 1), (_BLOCKS[1], 2, 2)]


def _all_cases(ranks):
    ssr_deepspeed.install()
    tokens = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(5)) + 0.5
    batches = list(tokens.split(2 // ranks))
    return [_step_on(batches, ranks, block, k, zero) for block, k, zero in _CASES]


def test_two_expert_parallel_ranks_compute_what_one_process_does(tmp_path):
    """Outputs, and gradients of every weight: the experts' scale included."""
    (whole,) = run_ranks(1, _all_cases, 1, folder=tmp_path)
    first, second = run_ranks(2, _all_cases, 2, folder=tmp_path)
    for case, one, a, b in zip(_CASES, whole, first, second, strict=True):
        torch.testing.assert_close(
            torch.tensor(one[0]), torch.tensor((a[0] + b[0]) / 2), msg=lambda m, c=case: f"{c}: {m}"
        )
        torch.testing.assert_close(
            one[1], torch.cat([a[1], b[1]]), rtol=1e-4, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}"
        )
        assert set(one[2]) == set(a[2]) | set(b[2])
        for name, gradient in one[2].items():
            for rank in (a, b):
                if name in rank[2]:
                    torch.testing.assert_close(
                        rank[2][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
                    )
        gate = one[2]["layers.0.deepspeed_moe.gate.wg.weight"]
        assert gate.abs().max() > 1e-4


def _monitored(path, enabled):
    ssr_deepspeed.install()
    rank = dist.get_rank()
    engine = build_engine(
        ToyModel(2, rank, drop=True, capacity_factor=1.0),
        {"enabled": enabled, "rule": "ssr", "probability": 0.5, "seed": 2, "monitor": {"interval": 3, "path": path}},
        gradient_accumulation_steps=2,
    )
    counted, received = torch.zeros(7, 2, EXPERTS), torch.zeros(7, 2, 2, 2)
    for step in range(7):
        for micro_batch in range(2):
            used = torch.rand(1, 30) < 0.7
            out = engine(torch.randn(1, 30, WIDTH), used)
            for index, layer in enumerate(engine.module.layers):
                counted[step, index] += layer.deepspeed_moe.exp_counts
                # Of 30 tokens, two experts each, with a capacity factor of 1.
                kept = layer.deepspeed_moe.exp_counts.clamp(max=math.ceil(60 / EXPERTS))
                received[step, micro_batch, index] = kept.view(2, -1).sum(1)
            engine.backward(out.square().mean())
            engine.step()
        engine.eval()
        engine(torch.randn(1, 30, WIDTH))
        engine.train()
    dist.all_reduce(counted)
    dist.all_reduce(received)
    return counted, received


@pytest.mark.parametrize("enabled", [True, False])
def test_the_monitor_counts_every_training_pass_of_all_ranks_and_nothing_else(tmp_path, enabled):
    path = tmp_path / "load.jsonl"
    (counted, received), _ = run_ranks(2, _monitored, str(path), enabled, folder=tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["kind"] for line in lines} <= {"load", "experts", "alert"}
    records = [line for line in lines if line["kind"] == "load"]
    loads = [line["load_over_mean"] for line in lines if line["kind"] == "experts"]
    assert [(record["step"], record["steps"]) for record in records] == [(3, 3), (6, 3)]
    for end, record, found in zip((3, 6), records, loads, strict=True):
        window = counted[end - 3 : end]
        for index, figures in enumerate(record["layers"].values()):
            load = window[:, index].sum(0)
            assert found[index] == pytest.approx((load / load.mean()).tolist(), abs=1e-3)
            by_rank = received[end - 1, :, index]
            straggler = (by_rank.max(1).values / by_rank.mean(1)).mean()
            assert figures["straggler"] == pytest.approx(float(straggler), abs=1e-5)
            assert 0 < figures["slot_fill"] <= 1
            assert 0 < figures["router_entropy"] <= 1
            by_step = (window[:, index].max(1).values / window[:, index].mean(1) - 1).mean()
            assert figures["max_vio"] == pytest.approx(float(by_step), abs=1e-5)
    config = SSRConfig.from_dict({"rule": "ssr", "probability": 0.5, "seed": 2})
    coins = [enabled and is_transport_step(config, step, 0) for step in range(3)]
    assert records[0]["layers"]["layers.0.deepspeed_moe.gate"]["transport_share"] == pytest.approx(
        sum(coins) / 3, abs=1e-6
    )


def _says():
    ssr_deepspeed.install()
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        build_engine(ToyModel(2, dist.get_rank(), noisy_gate_policy="RSample"), {})
    return [line for line in text.getvalue().splitlines() if line.startswith("SSR")]


def test_rank_zero_says_once_what_ssr_does(tmp_path):
    first, second = run_ranks(2, _says, folder=tmp_path)
    assert first[0].startswith("SSR active on 2 routers: layers.0.deepspeed_moe.gate")
    assert "noisy_gate_policy='RSample'" in first[1]
    assert second == []
