"""Balancing rules where a sequence's tokens, or the model's layers, are shared out among ranks."""

import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

import ssr_deepspeed
from ssr_deepspeed.hosts import rules
from ssr_deepspeed.hosts.rules import KEY
from tests.gloo import run_ranks
from tests.hosts.test_rules import BEFORE, LOSS_FREE, PLAIN, STILL, Accelerator, _batch, _gates
from tests.toy import WIDTH, ToyModel, build_engine

AFTER = BEFORE | {"carried": {"refresh": "after"}}
LIMIT = 0.6
TRIGGER = {"rule": "ssr", "probability": {"imbalance": LIMIT}}

MOE = LayerSpec(ToyModel, moe_layers=1)
DENSE = LayerSpec(torch.nn.Linear, WIDTH, WIDTH)


def _states(engine):
    return {
        name: {key: value.clone() for key, value in gate.ssr.rule.state.items()}
        for name, gate in engine.ssr.gates.items()
    }


def _coins(engine):
    return [gate.ssr.transport for gate in _gates(engine)]


class SequencePeers:
    """What a host that shares out sequences, and nothing else, says of its ranks: here all are of one sequence.

    It has a data-parallel group, as Megatron-DeepSpeed's has, and denies tensor parallelism, for which DeepSpeed's
    MoE would otherwise take these ranks.
    """

    def __init__(self):
        self._alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_sequence_parallel_group(self):
        return dist.group.WORLD

    def get_sequence_parallel_world_size(self):
        return dist.get_world_size()

    def get_sequence_data_parallel_group(self):
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self):
        return dist.get_world_size()

    def get_data_parallel_group(self):
        return self._alone

    def get_data_parallel_world_size(self):
        return 1

    def get_data_parallel_rank(self):
        return 0

    get_model_parallel_group = get_data_parallel_group
    get_model_parallel_world_size = get_data_parallel_world_size
    get_model_parallel_rank = get_data_parallel_rank
    get_tensor_model_parallel_world_size = get_data_parallel_world_size


def _states_of_steps(source, optimizer):
    """By rule: states after each of four steps, of this rank's share of every sequence."""
    ssr_deepspeed.install()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mpu = SequencePeers() if source == "mpu" else None
    mesh = {"sequence_parallel_size": ranks, "data_parallel_size": 1} if source == "mesh" else {}
    found = []
    for block in (AFTER, BEFORE, LOSS_FREE, TRIGGER | {"scope": "data_parallel"}):
        model = ToyModel(ranks, rank)
        for name, weight in model.named_parameters():
            weight.requires_grad_("experts" not in name)  # DeepSpeed averages their gradients, where it sums the others
        engine = build_engine(model, block, mpu=mpu, optimizer=optimizer, **mesh)
        for step in range(4):
            batch = _batch(step)
            out = engine(batch.chunk(ranks, dim=1)[rank])
            engine.backward(out.square().sum() / batch.numel())
            engine.step()
            found.append((_states(engine), _coins(engine)))
    return found


# By a mesh DeepSpeed 0.19.8 reduces no gradient over a sequence's ranks: their routers stay the same only untrained.
@pytest.mark.parametrize(("source", "optimizer"), [("mpu", PLAIN), ("mesh", STILL)])
def test_ranks_of_one_sequence_hold_the_state_that_one_rank_with_all_its_tokens_does(source, optimizer, tmp_path):
    (whole,) = run_ranks(1, _states_of_steps, None, optimizer, folder=tmp_path)
    first, second = run_ranks(2, _states_of_steps, source, optimizer, folder=tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-5)
    assert all(value.any() for states, _ in whole for state in states.values() for value in state.values())


def _pipeline(layers, block, **config):
    """The engine of a pipeline of two stages; a step takes two micro-batches."""
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda out, _: out.square().mean(), partition_method="uniform")
    steps = {
        "gradient_accumulation_steps": 2,
        "steps_per_print": 1000,
    }  # deepspeed 0.15 has no default for its pipelines
    return build_engine(model, block, gradient_clipping=1.0, **steps, **config)


def _load(engine, folder):
    # Plain gradient descent has no state, and deepspeed 0.16.9 cannot load it beside MoE without ZeRO.
    engine.load_checkpoint(folder, load_optimizer_states=False)


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
        engine = _pipeline(layers, block, optimizer=PLAIN)
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
        engine = _pipeline(layers, block, optimizer=PLAIN)
        _train(engine, [9])
        _load(engine, f"{folder}/{number}")
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
    _check_resuming([MOE] * 4, (AFTER, {"rule": "quantile"}, TRIGGER), tmp_path)


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
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
    _load(resumed, folder)
    return first + train(straight, range(1, 4)), first + train(resumed, range(1, 4))


def test_stages_decide_together_one_step_late_and_resume_where_they_were(tmp_path):
    expected = [False, True, False, False]
    assert run_ranks(2, _decided_late, str(tmp_path), folder=tmp_path) == [(expected, expected)] * 2
