"""Hugging Face models and AutoEP on real DeepSpeed engines and gloo ranks."""

import io
from contextlib import redirect_stderr

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ssr_deepspeed
from ssr_deepspeed.token_router import TokenRouter
from tests.gloo import run_ranks
from tests.hosts.families import skip_where_autoep_crashes, tiny_model

pytest.importorskip("deepspeed.moe.ep_router", reason="AutoEP came with deepspeed 0.19.2")

ADAMW = {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}


def build(model, block, **settings):
    ssr_deepspeed.install()
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": ADAMW, **settings}
    if block is not None:
        config["ssr"] = block
    return deepspeed.initialize(model=model, config=config)[0]


def batch(step, rank=0, sequences=2):
    """Tokens that can be learnt: each follows from the one before."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    first = torch.randint(3, 64, (sequences, 1), generator=generator)
    return 3 + (first - 3 + 7 * torch.arange(32)) % 61


def train(engine, steps, rank=0, start=0):
    engine.train()
    losses = []
    for step in range(start, start + steps):
        tokens = batch(step, rank)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def routers_of(engine):
    return [module for module in engine.module.modules() if isinstance(module, TokenRouter)]


def _loss_falls(family, stage, rule):
    engine = build(tiny_model(family), {"rule": rule, "monitor": {"interval": 4}}, zero_optimization={"stage": stage})
    assert len(routers_of(engine)) == 2
    losses = train(engine, 12, dist.get_rank())
    assert losses[-1] < losses[0] - 0.3, losses
    states = [router.ssr.rule.state["potentials"].tolist() for router in routers_of(engine)]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, states)
    assert everyone == [states] * len(everyone)
    assert all(any(potentials) for potentials in states)
    # 4 steps x 2 ranks x 2 sequences of 32 tokens, 2 experts each
    assert [sum(layer["load"]) for layer in engine.ssr.report["layers"].values()] == pytest.approx([1.0, 1.0], abs=1e-3)
    return losses[-1]


@pytest.mark.parametrize(("family", "stage"), [("mixtral", 2), ("qwen3_moe", 3), ("deepseek_v3", 1)])
def test_plain_models_train_on_two_ranks_under_zero(tmp_path, family, stage):
    run_ranks(2, _loss_falls, family, stage, "carried", folder=tmp_path)


def _counts_are_those_of_the_indices(enabled):
    engine = build(
        tiny_model("qwen3_moe"), {"rule": "ssr", "probability": 0.5, "enabled": enabled, "monitor": {"interval": 3}}
    )
    seen = {}

    def watch(name):
        def hook(module, inputs, output):
            if module.training and torch._C._current_graph_task_id() == -1:
                seen[name] = seen.get(name, 0) + torch.bincount(output[2].flatten(), minlength=8)

        return hook

    engine.module.gradient_checkpointing_enable()
    for name, module in engine.module.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(watch(name))
    train(engine, 3)
    engine.eval()
    with torch.no_grad():
        engine(input_ids=batch(9))
    for name, layer in engine.ssr.report["layers"].items():
        load = seen[name] / seen[name].sum()
        torch.testing.assert_close(torch.tensor(layer["load"], dtype=torch.float32), load)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_load_report_counts_what_the_routers_chose_in_training_once(tmp_path, enabled):
    run_ranks(1, _counts_are_those_of_the_indices, enabled, folder=tmp_path)


def _resumes_and_leaves(folder):
    block = {"rule": "carried"}
    engine = build(tiny_model("mixtral"), block, zero_optimization={"stage": 1})
    train(engine, 3)
    engine.save_checkpoint(folder)
    expected = train(engine, 3, start=3)
    again = build(tiny_model("mixtral", seed=5), block, zero_optimization={"stage": 1})
    again.load_checkpoint(folder)
    assert train(again, 3, start=3) == expected
    # Another rule goes on with the weights, and plain transformers takes them as they are.
    other = build(tiny_model("mixtral", seed=6), {"rule": "ssr"}, zero_optimization={"stage": 1})
    with redirect_stderr(io.StringIO()) as said:
        other.load_checkpoint(folder)
    assert 'rule "ssr" begins with its initial state' in said.getvalue() or "finds" not in said.getvalue()
    again.module.save_pretrained(f"{folder}/plain")
    ssr_deepspeed.uninstall()
    plain = type(again.module).from_pretrained(f"{folder}/plain").eval()
    assert not any(isinstance(module, TokenRouter) for module in plain.modules())
    again.module.eval()
    tokens = batch(7)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=tokens).logits, again.module(input_ids=tokens).logits)


def test_a_run_resumes_bit_for_bit_changes_its_rule_and_leaves_for_plain_transformers(tmp_path):
    run_ranks(1, _resumes_and_leaves, str(tmp_path / "checkpoints"), folder=tmp_path)


def _says(family, block, **changes):
    with redirect_stderr(io.StringIO()) as said:
        build(tiny_model(family, **changes), block)
    return said.getvalue()


def _what_is_said():
    assert "it would add, with output_router_logits=True, 0.001 times" in _says("mixtral", {})
    assert "it adds 0.01 times" in _says("mixtral", {}, router_aux_loss_coef=0.01, output_router_logits=True)
    assert "auxiliary loss" not in _says("mixtral", {}, router_aux_loss_coef=0.0)
    with pytest.raises(ValueError, match=r'rule "auxiliary" works by a loss, and this host takes none'):
        build(tiny_model("mixtral"), {"rule": "auxiliary"})
    with pytest.raises(ValueError, match="no rank has a router that SSR replaces"):
        build(torch.nn.Linear(4, 4), {})


def test_what_works_beside_ssr_and_what_cannot_is_said_at_the_start(tmp_path):
    run_ranks(1, _what_is_said, folder=tmp_path)


def _autoep(family, rule, size):
    engine = build(
        tiny_model(family),
        {"rule": rule, "monitor": {"interval": 4}},
        zero_optimization={"stage": 1},
        expert_parallel={"enabled": True, "autoep_size": size},
    )
    assert [type(router).__name__ for router in routers_of(engine)] == ["SSRTokenChoiceTopKRouter"] * 2
    losses = train(engine, 12, dist.get_rank())
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    states = [router.ssr.rule.state["potentials"] for router in routers_of(engine)]
    return (mean / dist.get_world_size()).tolist(), torch.stack(states).tolist()


PRESETS = ["mixtral", "deepseek_v3"] + [
    pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3_moe", "qwen2_moe", "deepseek_v2")
]


@pytest.mark.parametrize("family", PRESETS)
def test_every_autoep_preset_trains_on_two_ranks_as_without_expert_parallelism(tmp_path, family):
    skip_where_autoep_crashes(family)
    shared, split = (run_ranks(2, _autoep, family, "carried", size, folder=tmp_path) for size in (1, 2))
    assert split[0] == split[1]
    torch.testing.assert_close(torch.tensor(split[0][0]), torch.tensor(shared[0][0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(split[0][1]), torch.tensor(shared[0][1]), rtol=1e-2, atol=1e-2)
    assert split[0][0][-1] < split[0][0][0] - 0.3


def _autoep_by_stage():
    settings = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    engines = [build(tiny_model("mixtral"), {}, zero_optimization={"stage": stage}, **settings) for stage in (1, 3)]
    losses = [train(engine, 4, dist.get_rank()) for engine in engines]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_autoep_under_zero_3_trains_as_under_zero_1(tmp_path):
    skip_where_autoep_crashes("mixtral")
    run_ranks(2, _autoep_by_stage, folder=tmp_path)
