"""Balancing rules at the pace of a real engine: commits, ranks, accumulation, checkpoints."""

import contextlib
import copy
import io

import pytest
import torch
import torch.distributed as dist

import ssr_deepspeed
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.hosts.rules import KEY
from tests.gloo import run_ranks
from tests.toy import WIDTH, ToyModel, build_engine

PLAIN = {"type": "SGD", "params": {"lr": 0.1}}
STILL = {"type": "SGD", "params": {"lr": 0.0}}
GATE = "layers.0.deepspeed_moe.gate"

# The mean that a centred gradient lacks is that of a pass.
MASS = {
    "rule": "carried",
    "probability": 0.0,
    "gradient": "partial",
    "carried": {"polytope": "mass", "refresh": "after"},
}
COUNTS = {
    "rule": "carried",
    "probability": 0.0,
    "weights": "plan",
    "gradient": "partial",
    "carried": {"refresh": "after"},
}
BEFORE = {"rule": "carried", "probability": 0.0, "scope": "data_parallel"}
LOSS_FREE = {"rule": "loss_free", "rate": 0.05}
SOMETIMES = {"rule": "ssr", "probability": 0.5}
TRIGGER = {"rule": "ssr", "probability": {"imbalance": 0.3}}


class WithLoss(ToyModel):
    """Gives the sum of the layers' auxiliary losses too."""

    def forward(self, x, used=None):
        total = 0.0
        for layer in self.layers:
            out, l_aux, _ = layer(x, used)
            x, total = x + out, total + l_aux
        return x, total


def _gates(engine):
    return [module for module in engine.module.modules() if isinstance(module, SSRGate)]


def _states(engine):
    return [{name: value.clone() for name, value in gate.ssr.rule.state.items()} for gate in _gates(engine)]


def _batch(step, part=slice(None)):
    """Two rows of tokens of optimizer step `step`, or some of them."""
    generator = torch.Generator().manual_seed(100 + step)
    return (torch.randn(2, 24, WIDTH, generator=generator) + 0.5)[part]


def _step(engine, *micro_batches, seed=0):
    torch.manual_seed(seed)
    for batch in micro_batches:
        engine.backward(engine(batch).square().mean())
        engine.step()


def _states_of_steps(block, parts, accumulation=1):
    engine = build_engine(ToyModel(), block, optimizer=PLAIN, gradient_accumulation_steps=accumulation)
    states = []
    for step in range(4):
        _step(engine, *(_batch(step, part) for part in parts))
        states.append(_states(engine))
    return states


def _alone():
    ssr_deepspeed.install()
    halves = [slice(0, 1), slice(1, 2)]
    return [
        (_states_of_steps(b, [slice(None)]), _states_of_steps(b, halves, 2)) for b in (MASS, COUNTS, LOSS_FREE, BEFORE)
    ]


def _together():
    ssr_deepspeed.install()
    rank = dist.get_rank()
    return [_states_of_steps(block, [slice(rank, rank + 1)]) for block in (MASS, COUNTS, LOSS_FREE, BEFORE)]


def test_two_ranks_and_two_micro_batches_commit_what_one_batch_of_all_does(tmp_path):
    (alone,) = run_ranks(1, _alone, folder=tmp_path)
    first, second = run_ranks(2, _together, folder=tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for number, ((whole, accumulated), ranks) in enumerate(zip(alone, first, strict=True)):
        if number < 3:  # refreshed before routing, a micro-batch knows only itself
            torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ranks, whole, rtol=1e-4, atol=1e-5)
        for name in whole[0][0]:
            moved = [(states[layer][name] != 0).any() for states in whole for layer in (0, 1)]
            assert all(moved)
            assert not torch.equal(whole[0][0][name], whole[3][0][name])


# With ZeRO, or without the optimizer's state: deepspeed 0.16.9 looks for that of a MoE without ZeRO in the wrong file.
def _resumed(folder):
    ssr_deepspeed.install()
    rank = dist.get_rank()
    for number, block in enumerate((COUNTS, {"rule": "noisy", "rate": 0.1}, {"rule": "quantile"}, TRIGGER)):
        engine = build_engine(ToyModel(2, rank), block, zero=1)
        for step in range(3):
            _step(engine, _batch(step, slice(rank, rank + 1)), seed=step)
        client = {"mine": [1, 2]}
        engine.save_checkpoint(f"{folder}/{number}", "tag", client)
        assert client == {"mine": [1, 2]}, "the caller's dict"
        saved, coins = _states(engine), [gate.ssr.transport for gate in _gates(engine)]
        fresh = build_engine(ToyModel(2, rank), block, zero=1)
        _step(fresh, _batch(9, slice(rank, rank + 1)))
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            _, theirs = fresh.load_checkpoint(f"{folder}/{number}")
        assert theirs["mine"] == [1, 2]
        assert "ssr" not in theirs
        assert "SSR" not in text.getvalue()
        torch.testing.assert_close(_states(fresh), saved, rtol=0, atol=0)
        assert [gate.ssr.transport for gate in _gates(fresh)] == coins
        assert any(value.any() for state in saved for value in state.values())
        for step in range(3, 5):
            for run in (engine, fresh):
                _step(run, _batch(step, slice(rank, rank + 1)), seed=step)
        torch.testing.assert_close(_states(fresh), _states(engine), rtol=0, atol=0)
        for a, b in zip(engine.module.parameters(), fresh.module.parameters(), strict=True):
            assert torch.equal(a, b)
    return None


def test_a_resumed_run_goes_on_bit_for_bit_and_the_users_own_state_survives(tmp_path):
    run_ranks(2, _resumed, str(tmp_path), folder=tmp_path)


CARRIED = 'rule "carried" (cost "linear", polytope "capacity")'
_CROSSINGS = [
    # the writer's block, the reader's, what rank 0 says
    (COUNTS, None, None),
    (COUNTS, SOMETIMES, None),
    (COUNTS, {"enabled": False}, None),
    (COUNTS, LOSS_FREE, f'finds the state of {CARRIED} in the checkpoint: rule "loss_free" begins with its initial'),
    (COUNTS, MASS, f"finds the state of {CARRIED} in the checkpoint"),
    (None, COUNTS, f"finds no balancing rule's state in the checkpoint: {CARRIED} begins with its initial state"),
    ({"enabled": False}, COUNTS, "finds no balancing rule's state"),
    (SOMETIMES, TRIGGER, "finds no balancing rule's state"),
]


def _crosses(folder):
    ssr_deepspeed.install()
    lines = []
    written = []
    for block, reading, _ in _CROSSINGS:
        if block not in written:
            writer = build_engine(ToyModel(), block, zero=1)
            _step(writer, _batch(0))
            writer.save_checkpoint(f"{folder}/{len(written)}")
            written.append(block)
        reader = build_engine(ToyModel(), reading, zero=1)
        _step(reader, _batch(2))  # what it has by then goes
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            _, client = reader.load_checkpoint(f"{folder}/{written.index(block)}", load_module_strict=True)
        assert reading is None or KEY not in client
        lines.append([line for line in text.getvalue().splitlines() if line.startswith("SSR")])
        assert not any(value.any() for state in _states(reader) for value in state.values())
        weights = torch.load(
            f"{folder}/{written.index(block)}/global_step1/mp_rank_00_model_states.pt", weights_only=False
        )
        assert torch.equal(reader.module.state_dict()[f"{GATE}.wg.weight"], weights["module"][f"{GATE}.wg.weight"])
        _step(reader, _batch(1))
    return lines


def test_checkpoints_cross_between_rules_strictly_and_rank_zero_says_what_was_left_out(tmp_path):
    first, second = run_ranks(2, _crosses, str(tmp_path), folder=tmp_path)
    for (_, _, sentence), said in zip(_CROSSINGS, first, strict=True):
        assert len(said) == (sentence is not None)
        assert all(line.startswith(f"SSR {sentence}") for line in said)
    assert not any(second)


class Accelerator:
    """A device whose values the host reads one step late."""

    type = "accelerator"


def _late_triggers(folder):
    """Transport of each step, straight on and resumed after the third."""
    from ssr_deepspeed.hosts import rules

    ssr_deepspeed.install()
    rules.to_host = lambda tensor: (tensor.clone(), type("Copied", (), {"synchronize": lambda self: None})())

    def engine_of():
        engine = build_engine(ToyModel(), TRIGGER, optimizer=PLAIN)
        engine.ssr._rules._device = Accelerator()
        return engine

    def train(engine, steps):
        seen = []
        for step in steps:
            seen.append([gate.ssr.transport for gate in _gates(engine)])
            _step(engine, _batch(step) * (1 + step % 3))
        return seen

    straight = engine_of()
    first = train(straight, range(3))
    straight.save_checkpoint(folder)
    rest = train(straight, range(3, 7))
    resumed = engine_of()
    resumed.load_checkpoint(folder, load_optimizer_states=False)
    return first, rest, train(resumed, range(3, 7))


def test_a_trigger_read_one_step_late_resumes_where_it_was(tmp_path):
    ((first, rest, resumed),) = run_ranks(1, _late_triggers, str(tmp_path), folder=tmp_path)
    assert resumed == rest
    assert len({coin for step in first + rest for coin in step}) == 2


def _refuses_states():
    ssr_deepspeed.install()
    engine = build_engine(ToyModel(), COUNTS)
    saved = engine.ssr.before_save(engine)
    other = copy.deepcopy(saved)
    other["layers"][GATE]["state"]["potentials"] = torch.zeros(6)
    with pytest.raises(
        ValueError, match=rf'"potentials" of rule "carried" at {GATE}: it has shape \(6,\) .*\(4,\) here'
    ):
        engine.ssr.after_load(engine, other)
    del saved["layers"][GATE]
    with pytest.raises(ValueError, match=rf"at {GATE}: it is missing in the checkpoint"):
        engine.ssr.after_load(engine, saved)


def test_a_state_of_another_number_of_experts_or_without_a_layer_is_refused(tmp_path):
    run_ranks(1, _refuses_states, folder=tmp_path)


def _losses():
    ssr_deepspeed.install()
    return [_losses_under(rule, dist.get_rank()) for rule in ("auxiliary", "global_auxiliary", "z")]


def _losses_under(rule, rank):
    engine = build_engine(WithLoss(2, rank), {"rule": rule}, optimizer=PLAIN)
    losses = []
    for _ in range(8):
        l_aux = engine(_batch(0, slice(rank, rank + 1)))[1]
        engine.backward(l_aux)
        engine.step()
        losses.append(l_aux.item())
    # One rank alone leaves it out, or weighs it with zero: all are told.
    for weight in (None, 0.0):
        deaf = build_engine(WithLoss(2, rank), {"rule": rule})
        out, l_aux = deaf(_batch(0, slice(rank, rank + 1)))
        loss = out.square().mean()
        deaf.backward(loss if weight is None and rank else loss + (weight or float(rank == 0)) * l_aux)
        with pytest.raises(RuntimeError, match=rf'ssr.rule = "{rule}" works by a loss.*moe.layer.MoE returns'):
            deaf.step()
    return losses


def _frozen_router():
    ssr_deepspeed.install()
    model = WithLoss()
    for layer in model.layers:
        layer.deepspeed_moe.gate.wg.weight.requires_grad_(False)
    engine = build_engine(model, {"rule": "auxiliary"})
    out, l_aux = engine(_batch(0))
    engine.backward(out.square().mean() + 0.01 * l_aux)
    engine.step()
    return engine.global_steps


def test_nobody_misses_the_loss_of_a_router_that_is_not_trained(tmp_path):
    assert run_ranks(1, _frozen_router, folder=tmp_path) == [1]


def test_a_loss_that_the_training_loss_lacks_is_an_error_on_all_ranks_and_one_in_it_falls(tmp_path):
    for rules in run_ranks(2, _losses, folder=tmp_path):
        for losses in rules:
            assert losses[-1] < losses[0] - 0.01


def _announces():
    ssr_deepspeed.install()
    text = io.StringIO()
    block = {**LOSS_FREE, "entropy": 0.5, "probability": {"imbalance": 0.3}, "seed": 3}
    with contextlib.redirect_stderr(text):
        engine = build_engine(ToyModel(), block)
        for step in range(2):
            _step(engine, _batch(step))
    assert all(state["bias"].any() for state in _states(engine))
    return [line for line in text.getvalue().splitlines() if "plays no part" in line]


def test_keys_that_play_no_part_are_named_once_by_rank_zero_and_play_none(tmp_path):
    first, second = run_ranks(2, _announces, folder=tmp_path)
    assert first == [f'SSR "{key}" plays no part under rule "loss_free"' for key in ("entropy", "probability", "seed")]
    assert second == []


def _skipped():
    ssr_deepspeed.install()
    for block in (COUNTS, LOSS_FREE, {"rule": "noisy"}, TRIGGER):
        engine, other = (build_engine(ToyModel(), block, optimizer=STILL) for _ in range(2))
        before = _states(engine)
        engine.was_step_applied = lambda: False
        _step(engine, _batch(0))
        torch.testing.assert_close(_states(engine), before, rtol=0, atol=0)
        del engine.was_step_applied
        for run in (engine, other):
            _step(run, _batch(1))
        torch.testing.assert_close(_states(engine), _states(other), rtol=0, atol=0)
        assert any(value.any() for state in _states(engine) for value in state.values())


def test_a_skipped_step_commits_nothing_then_or_later(tmp_path):
    run_ranks(1, _skipped, folder=tmp_path)


def _triggered():
    ssr_deepspeed.install()
    rank = dist.get_rank()
    part = slice(rank, rank + 1)

    def engine_of(imbalance, per):
        block = {"rule": "ssr", "probability": {"imbalance": imbalance}, "per": per, "scope": "data_parallel"}
        return build_engine(ToyModel(2, rank), block, optimizer=STILL)

    measuring = engine_of(1e6, "layer")
    _step(measuring, _batch(0, part))
    imbalances = [state["imbalance"].item() for state in _states(measuring)]
    assert max(imbalances) > min(imbalances) > 0
    assert not any(gate.ssr.transport for gate in _gates(measuring))
    found = [imbalances]
    for per in ("layer", "step"):
        engine = engine_of(sum(imbalances) / 2, per)
        assert not any(gate.ssr.transport for gate in _gates(engine))
        _step(engine, _batch(0, part))
        coins = [gate.ssr.transport for gate in _gates(engine)]
        engine(_batch(0, part))
        assert [gate.ssr.solution is not None for gate in _gates(engine)] == coins
        found.append(coins)
    return found


def test_a_trigger_sets_the_next_step_of_each_layer_or_of_all_on_all_ranks_alike(tmp_path):
    first, second = run_ranks(2, _triggered, folder=tmp_path)
    assert first == second
    imbalances, by_layer, by_step = first
    assert by_layer == [value == max(imbalances) for value in imbalances]
    assert by_step == [True, True]
