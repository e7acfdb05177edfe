"""Balancing rules where the layers are shared out among pipeline stages."""

import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

import ssr_deepspeed
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.hosts import rules
from ssr_deepspeed.hosts.rules import KEY
from tests.gloo import run_ranks
from tests.hosts.test_rules import Accelerator
from tests.toy import WIDTH, ToyModel, build_engine

STILL = {"type": "SGD", "params": {"lr": 0.0}}
CARRIED = {"rule": "carried", "probability": 0.0, "carried": {"refresh": "after"}}
LIMIT = 0.6
TRIGGER = {"rule": "ssr", "probability": {"imbalance": LIMIT}}

MOE = LayerSpec(ToyModel, moe_layers=1)
DENSE = LayerSpec(torch.nn.Linear, WIDTH, WIDTH)


def _gates(engine):
    return [module for module in engine.module.modules() if isinstance(module, SSRGate)]


def _states(engine):
    return {
        name: {key: value.clone() for key, value in gate.ssr.rule.state.items()}
        for name, gate in engine.ssr.gates.items()
    }


def _coins(engine):
    return [gate.ssr.transport for gate in _gates(engine)]


def _batch(step):
    """Two rows of tokens of optimizer step `step`."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, 24, WIDTH, generator=generator) + 0.5


def _pipeline(layers, block, **config):
    """The engine of a pipeline of two stages; a step takes two micro-batches."""
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda out, _: out.square().mean(), partition_method="uniform")
    return build_engine(model, block, gradient_accumulation_steps=2, **config)


def _train(engine, steps):
    for step in steps:
        torch.manual_seed(step)
        engine.train_batch(iter([(row, row) for row in _batch(step).split(1)]))


def _result(engine):
    return _states(engine), _coins(engine), [weight.detach().clone() for weight in engine.module.parameters()]


def _straight(layers, blocks, folder):
    """States when the checkpoint was saved, the rules' part of this stage's file, and where the run has come to."""
    ssr_deepspeed.install()
    found = []
    for number, block in enumerate(blocks):
        engine = _pipeline(layers, block)
        _train(engine, range(2))
        path = f"{folder}/{number}"
        engine.save_checkpoint(path, "tag")
        file = torch.load(f"{path}/tag/mp_rank_0{dist.get_rank()}_model_states.pt", weights_only=False)
        saved = _states(engine)
        _train(engine, range(2, 4))
        found.append((saved, file[KEY]["layers"], _result(engine)))
    return found


def _resumed(layers, blocks, folder):
    ssr_deepspeed.install()
    found = []
    for number, block in enumerate(blocks):
        engine = _pipeline(layers, block)
        _train(engine, [9])
        engine.load_checkpoint(f"{folder}/{number}")
        loaded = _states(engine)
        _train(engine, range(2, 4))
        found.append((loaded, _result(engine)))
    return found


def _check_resuming(layers, blocks, folder):
    writers = run_ranks(2, _straight, layers, blocks, str(folder), folder=folder)
    readers = run_ranks(2, _resumed, layers, blocks, str(folder), folder=folder)
    for writer, reader in zip(writers, readers, strict=True):
        for (saved, _, straight), (loaded, resumed) in zip(writer, reader, strict=True):
            torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
            torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
    names = [f"{place}.layers.0.deepspeed_moe.gate" for place, layer in enumerate(layers) if layer is MOE]
    for (own, file, _), (other_own, other_file, _) in zip(*writers, strict=True):
        torch.testing.assert_close(file, other_file, rtol=0, atol=0)
        assert list(file) == names
        torch.testing.assert_close({name: layer["state"] for name, layer in file.items()}, own | other_own)
        sizes = {sum(value.abs().sum().item() for value in layer["state"].values()) for layer in file.values()}
        assert 0.0 not in sizes
        assert len(sizes) >= len(names) - 1, "hardly two layers are alike"


def test_every_stage_saves_the_state_of_all_layers_and_a_resumed_pipeline_goes_on_bit_for_bit(tmp_path):
    _check_resuming([MOE] * 4, (CARRIED, {"rule": "quantile"}, TRIGGER), tmp_path)


@pytest.mark.parametrize("place", [0, 1])
def test_a_stage_without_routers_saves_those_of_the_other_and_nobody_waits_in_vain(place, tmp_path):
    _check_resuming([DENSE, MOE] if place else [MOE, DENSE], (TRIGGER,), tmp_path)


def _route_evenly(engine, but=None):
    """Make every layer pass its tokens on as they are, and each expert ask for as many, but for one stage."""
    signs = torch.tensor([[1.0, -1.0] * 8, [-1.0, 1.0] * 8, [1.0, 1.0, -1.0, -1.0] * 4, [-1.0, -1.0, 1.0, 1.0] * 4])
    for name, weight in engine.module.named_parameters():
        if "experts" in name:
            weight.data.zero_()
        else:
            weight.data.copy_(torch.arange(4.0).unsqueeze(1) if but == dist.get_rank() else signs)


def _decided(per):
    """By step: the imbalance measured, the coin after it, and whether the next step solved anything."""
    ssr_deepspeed.install()
    engine = _pipeline([MOE, MOE], TRIGGER | {"per": per}, optimizer=STILL)
    seen = []
    for stage in (0, 1, None):
        _route_evenly(engine, but=stage)
        _train(engine, [0])
        (state,), (coin,) = _states(engine).values(), _coins(engine)
        _train(engine, [1])
        seen.append((state["imbalance"].item(), coin, _gates(engine)[0].ssr.solution is not None))
    return seen


@pytest.mark.parametrize("per", ["step", "layer"])
def test_one_uneven_layer_of_either_stage_makes_a_step_of_all_layers_a_transport_step(per, tmp_path):
    for stage, seen in enumerate(run_ranks(2, _decided, per, folder=tmp_path)):
        for step, (imbalance, coin, solved) in enumerate(seen):
            assert (imbalance > 0.8) == (step == stage)
            assert imbalance > 0.8 or imbalance < LIMIT
            assert coin == solved == (step in (0, 1) if per == "step" else step == stage)


def _decided_late(folder):
    """Coins after each of four steps, straight on and resumed after the first, when the second stage was uneven."""
    ssr_deepspeed.install()
    rules.to_host = lambda tensor: (tensor.clone(), type("Copied", (), {"synchronize": lambda self: None})())

    def engine_of():
        engine = _pipeline([MOE, MOE], TRIGGER, optimizer=STILL)
        engine.ssr._rules._device = Accelerator()
        return engine

    def train(engine, steps):
        seen = []
        for step in steps:
            _route_evenly(engine, but=None if step else 1)
            _train(engine, [step])
            seen += _coins(engine)
        return seen

    straight = engine_of()
    first = train(straight, [0])
    straight.save_checkpoint(folder)
    resumed = engine_of()
    resumed.load_checkpoint(folder)
    return first + train(straight, range(1, 4)), first + train(resumed, range(1, 4))


def test_stages_decide_together_one_step_late_and_resume_where_they_were(tmp_path):
    expected = [False, True, False, False]
    assert run_ranks(2, _decided_late, str(tmp_path), folder=tmp_path) == [(expected, expected)] * 2
