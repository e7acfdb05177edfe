import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssr_deepspeed.pretrain.config import ModelConfig
from ssr_deepspeed.pretrain.model import IGNORED
from ssr_deepspeed.pretrain.train import _build_engine
from tests.gloo import run_ranks
from tests.pretrain.tiny import tiny_run

ROOT = Path(__file__).parents[2]


def _engine(cache, checkpointing="none", **options):
    config = tiny_run(cache, model={"activation_checkpointing": checkpointing, **options.pop("model", {})}, **options)
    return _build_engine(config, 257, dist.get_rank())


def _recomputation(cache):
    """Counts, loss and gradients of two accumulated passes, for each way of checkpointing."""
    results = {}
    for kind in ("none", "reentrant", "non_reentrant", "deepspeed"):
        engine = _engine(
            cache,
            kind,
            model={"capacity_factor": 1.0, "dropout": 0.1},
            ssr={
                "rule": "ssr",
                "probability": 0.5,
                "per": "layer",
                "seed": 2,
                "noise": {"scale": 0.5},
                "monitor": {"interval": 1},
            },
            deepspeed={"zero_optimization": {"stage": 0}},
        )
        assert [gate.ssr.transport for gate in engine.gate_modules] == [True, False]
        torch.manual_seed(7)
        losses = []
        for _ in range(2):
            tokens = torch.randint(0, 257, (4, 33))
            output = engine(tokens[:, :-1], tokens[:, 1:])
            engine.backward(output.loss)
            losses.append(output.loss.item())
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        gradients = {name: weight.grad.clone() for name, weight in engine.module.named_parameters()}
        engine.step()
        results[kind] = (losses, gradients, engine.ssr.report["layers"])
    return results


def test_recomputation_repeats_routes_noise_and_gradients_and_counts_nothing_twice(cache, tmp_path):
    for results in run_ranks(2, _recomputation, cache, folder=tmp_path):
        losses, gradients, layers = results["none"]
        assert [figures["transport_share"] for figures in layers.values()] == [1.0, 0.0]
        for kind in ("reentrant", "non_reentrant", "deepspeed"):
            other_losses, other_gradients, other_layers = results[kind]
            assert other_losses == losses, kind
            assert other_layers == layers, kind
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    other_gradients[name], gradient, msg=lambda m, k=kind, n=name: f"{k} {n} {m}"
                )


def _dropout(cache):
    """Losses of one batch: in training without dropout, with it, twice more, and in evaluation."""
    tokens = torch.randint(0, 257, (4, 33))

    def loss(engine, train):
        torch.manual_seed(1)
        engine.train(train)
        return engine(tokens[:, :-1], tokens[:, 1:]).loss.item()

    options = {"ssr": {"rule": "none"}, "model": {"capacity_factor": 4.0, "eval_capacity_factor": 4.0, "ep_size": 1}}
    plain = _engine(cache, **options)
    dropping = _engine(cache, **{**options, "model": {**options["model"], "dropout": 0.3}})
    return [loss(plain, True), loss(dropping, True), loss(dropping, True), loss(dropping, False), loss(plain, False)]


@pytest.mark.slow
def test_dropout_acts_in_training_alone(cache, tmp_path):
    (losses,) = run_ranks(1, _dropout, cache, folder=tmp_path)
    plain, dropped, again, evaluated, plainly_evaluated = losses
    assert dropped == again != plain
    assert evaluated == plainly_evaluated == pytest.approx(plain, rel=1e-4)
    assert abs(dropped - plain) > 1e-3


def _padding(cache):
    engine = _engine(cache, model={"eval_capacity_factor": 4.0})
    engine.eval()
    tokens = torch.randint(0, 257, (4, 33))
    labels, used = tokens[:, 1:].clone(), torch.ones(4, 32, dtype=torch.bool)
    used[2:, 20:] = False
    labels[~used] = IGNORED
    whole = engine(tokens[:, :-1], labels, used)
    changed = tokens[:, :-1].clone()
    changed[~used] = 5
    again = engine(changed, labels, used)
    assert torch.equal(whole.nats, again.nats)
    assert torch.equal(whole.counts_NE, again.counts_NE)
    assert whole.counts_NE.sum(1).tolist() == [2 * int(used.sum())] * 2
    nobody = engine(tokens[:, :-1], torch.full_like(labels, IGNORED), torch.zeros_like(used))
    assert nobody.loss.item() == 0
    assert int(nobody.counts_NE.sum()) == 0


def test_padding_reaches_neither_experts_nor_counts_nor_loss(cache, tmp_path):
    run_ranks(2, _padding, cache, folder=tmp_path)


def _causality(cache):
    engine = _engine(cache, model={"eval_capacity_factor": 4.0})
    engine.eval()
    tokens = torch.randint(0, 257, (1, 17))
    labels = torch.full((1, 16), IGNORED)
    labels[0, 7] = 3
    before = engine(tokens[:, :-1], labels).nats
    later = tokens[:, :-1].clone()
    later[0, 8:] = 0
    earlier = tokens[:, :-1].clone()
    earlier[0, 0] = (earlier[0, 0] + 1) % 257
    assert torch.allclose(engine(later, labels).nats, before)
    assert not torch.allclose(engine(earlier, labels).nats, before)


def test_a_token_sees_the_past_and_not_the_future(cache, tmp_path):
    run_ranks(2, _causality, cache, folder=tmp_path)


def _other_shapes(cache):
    for model in (
        {"moe_every": 2},
        {"residual": True},
        {"tie_embeddings": False},
        {"drop_tokens": False},
        {"top_k": 1},
    ):
        engine = _engine(cache, model=model)
        layers = 1 if "moe_every" in model else 2
        for _ in range(2):
            tokens = torch.randint(0, 257, (4, 33))
            output = engine(tokens[:, :-1], tokens[:, 1:])
            assert output.counts_NE.shape == (layers, 4)
            engine.backward(output.loss)
            engine.step()
        assert torch.isfinite(output.loss)


def test_every_option_of_the_architecture_trains(cache, tmp_path):
    run_ranks(2, _other_shapes, cache, folder=tmp_path)


def _weights(cache, ranks):
    engine = _engine(cache, model={"ep_size": ranks})
    local = 4 // ranks
    found = {}
    for name, weight in engine.module.named_parameters():
        if "deepspeed_experts." in name:
            before, after = name.split("deepspeed_experts.")
            index, rest = after.split(".", 1)
            name = f"{before}{int(index) + local * dist.get_rank()}.{rest}"
        found[name] = weight.detach().clone()
    return found


def test_the_initial_weights_do_not_depend_on_the_number_of_ranks(cache, tmp_path):
    (whole,) = run_ranks(1, _weights, cache, 1, folder=tmp_path)
    first, second = run_ranks(2, _weights, cache, 2, folder=tmp_path)
    assert set(first) | set(second) == set(whole)
    for part in (first, second):
        for name, weight in part.items():
            assert torch.equal(weight, whole[name]), name
    experts = [weight for name, weight in whole.items() if "experts" in name and "w_in" in name]
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/model/*.json")), ids=lambda file: file.stem)
def test_every_shipped_architecture_is_valid(file):
    settings = json.loads(file.read_text())
    assert ModelConfig.from_dict(settings, "model").to_dict().items() >= settings.items()
