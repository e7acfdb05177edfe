"""`deepspeed.moe.layer.MoE` on real engines: tensor parallelism, unequal batches, checkpoints, fp16, timers."""

import logging
import math
import os

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.utils import logger

import ssr_deepspeed
from ssr_deepspeed.collectives import host_group, host_groups
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from tests.gloo import run_ranks
from tests.hosts.test_oracle import OFF
from tests.hosts.test_rules import BEFORE, COUNTS, LOSS_FREE, PLAIN, _batch, _gates, _states, _step
from tests.hosts.test_scaler import AUTOCAST
from tests.hosts.test_scaler import _step as _scaled_step
from tests.hosts.test_scaler import pytestmark as needs_torch_scaler
from tests.toy import EXPERTS, WIDTH, ToyModel, build_engine, global_name

TRANSPORT = {"rule": "ssr", "probability": 1.0, "scope": "data_parallel"}
SLOW = {"type": "SGD", "params": {"lr": 1e-3}}
MOMENTUM = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def _gather_flat():
    """Let gloo gather what DeepSpeed gives it, `[E, C, M]` of each rank into a flat buffer; NCCL takes it as it is."""
    backend = deepspeed.comm.comm.cdb
    gather = backend.all_gather_function

    def gather_flat(output_tensor, input_tensor, **rest):
        return gather(output_tensor=output_tensor, input_tensor=input_tensor.reshape(-1), **rest)

    backend.all_gather_function = gather_flat


class TensorPeers:
    """Tensor parallelism of size 2, as a host such as Megatron-DeepSpeed tells it to DeepSpeed."""

    def __init__(self):
        _gather_flat()
        ranks, rank = dist.get_world_size(), dist.get_rank()
        pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
        others = [dist.new_group(list(range(place, ranks, 2))) for place in (0, 1)]
        self._pair, self._others = pairs[rank // 2], others[rank % 2]

    def get_model_parallel_group(self):
        return self._pair

    def get_model_parallel_world_size(self):
        return 2

    def get_model_parallel_rank(self):
        return dist.get_rank(self._pair)

    def get_data_parallel_group(self):
        return self._others

    def get_data_parallel_world_size(self):
        return dist.get_world_size(self._others)

    def get_data_parallel_rank(self):
        return dist.get_rank(self._others)


def _detached(output):
    return [item.detach() if isinstance(item, torch.Tensor) else item for item in output]


def _watched(engine):
    """What the gates return from now on, as a list that fills."""
    seen = []
    for gate in engine.gate_modules:
        gate.register_forward_hook(lambda module, inputs, output: seen.append(_detached(output[1:])))
    return seen


def _capacity(output):
    return int(output[0]) if len(output) == 6 else output[0].shape[2]


def _gate_runs(paired, drops):
    """By rule: outputs, gate weights, states, routes and counted loads of four steps in which gates alone are trained.

    DeepSpeed averages the gradients of experts over tensor-parallel peers, each of which saw half of the slots.
    """
    ssr_deepspeed.install()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mpu = TensorPeers() if paired else None
    ep_size = ranks // 2 if paired else 1
    row = slice(rank // 2, rank // 2 + 1) if ranks == 4 else slice(None)
    found = []
    for drop in drops:
        # 25 slots: a number that tensor-parallel ranks cannot share out.
        capacity = {"drop": drop, "capacity_factor": 1.02, "min_capacity": 4 if paired else 26}
        for block in (BEFORE, COUNTS, LOSS_FREE, TRANSPORT):
            model = ToyModel(ep_size, rank % ep_size, **capacity)
            for name, weight in model.named_parameters():
                weight.requires_grad_("experts" not in name)
            engine = build_engine(model, block, mpu=mpu, optimizer=SLOW, gradient_clipping=0.0)
            routes, outputs = _watched(engine), []
            for step in range(4):
                out = engine(_batch(step, row))
                engine.backward(out.square().mean())
                engine.step()
                outputs.append(out.detach())
            gates = [gate.wg.weight.detach().clone() for gate in _gates(engine)]
            counts = engine.ssr._monitor.counts
            demand = counts.save()["steps"][..., :EXPERTS] / counts.copies
            found.append((outputs, gates, _states(engine), routes, demand, [_capacity(output) for output in routes]))
    return found


def _check_gate_runs(whole, ranks, rows):
    """Ranks against one process with all rows; `rows` of a rank's output."""
    for case, one in enumerate(whole):
        outputs, gates, states, _, demand, capacities = one
        for rank, found in enumerate(ranks):
            mine, peer = found[case], ranks[rank ^ 1][case]
            torch.testing.assert_close(mine, peer, rtol=0, atol=0)
            torch.testing.assert_close(mine[0], [out[rows[rank]] for out in outputs], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine[1:3], (gates, states), rtol=1e-4, atol=1e-5)
            assert torch.equal(mine[4], demand), "tokens that peers share are counted once"
            assert all(capacity % 2 == 0 for capacity in mine[5])
            if len(ranks) == 2 and case < 4:
                assert mine[5] == capacities == [26] * 8
        assert demand.sum(-1).tolist() == [[2 * 24 * 2] * 2] * 4
        assert not torch.equal(gates[0], gates[1])


def _trained_with_peers(block):
    rank, mpu = dist.get_rank(), TensorPeers()
    engine = build_engine(ToyModel(2, rank, **OFF), block, mpu=mpu, optimizer=SLOW)
    for step in range(3):
        _step(engine, _batch(step))
    return [weight.detach().clone() for weight in engine.module.parameters()]


def _tensor_pair():
    found = _gate_runs(True, (True, False))
    return found, _trained_with_peers({"rule": "none"}), _trained_with_peers(None)


def test_tensor_parallel_peers_route_alike_to_the_bit_and_as_one_rank_does(tmp_path):
    """Two ranks that hold all experts; and, with all weights trained and experts shared out, as `TopKGate`'s peers."""
    (whole,) = run_ranks(1, _gate_runs, False, (True, False), folder=tmp_path)
    pair = run_ranks(2, _tensor_pair, folder=tmp_path)
    _check_gate_runs(whole, [found for found, _, _ in pair], [slice(None)] * 2)
    for _, ours, theirs in pair:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_two_tensor_parallel_pairs_of_two_expert_parallel_ranks_compute_what_one_process_does(tmp_path):
    (whole,) = run_ranks(1, _gate_runs, False, (False,), folder=tmp_path)
    four = run_ranks(4, _gate_runs, True, (False,), folder=tmp_path)
    _check_gate_runs(whole, four, [slice(0, 1)] * 2 + [slice(1, 2)] * 2)


def _states_of_unlike_sums(offset):
    """States after two steps in which the second peer's sums are larger by a share `offset`."""
    ssr_deepspeed.install()
    rank, mpu, found = dist.get_rank(), TensorPeers(), []
    for block in (BEFORE, COUNTS, LOSS_FREE, {"rule": "noisy"}, {"rule": "quantile"}):
        engine = build_engine(ToyModel(2, rank, **OFF), block, mpu=mpu, optimizer=PLAIN)
        engine.ssr._rules._total = lambda total: total + offset * rank * torch.rand_like(total) * total
        for step in range(2):
            _step(engine, _batch(step), seed=step)
        found += [value.detach() for state in _states(engine) for value in state.values()]
    return found


def test_tensor_parallel_peers_keep_one_state_though_each_sums_over_other_ranks(tmp_path):
    """Their sums go through rings of their own, and may differ in the last bit."""
    first, second = run_ranks(2, _states_of_unlike_sums, 0.1, folder=tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(value.any() for value in first)


class Recomputing(ToyModel):
    """Throws the activations of its layers away and computes them again for the backward pass."""

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.utils.checkpoint.checkpoint(lambda x, layer=layer: layer(x)[0], x, use_reentrant=False)
        return x


def _refused(engine, batch):
    with pytest.raises(ValueError) as error:
        engine(batch)
    return str(error.value)


def _unequal_capacities():
    """Messages of passes in which the ranks' capacities differ, between passes in which they do not."""
    ssr_deepspeed.install()
    rank = dist.get_rank()
    equal, unequal = torch.randn(1, 24, WIDTH), torch.randn(1, 24 - 8 * rank, WIDTH)
    said = []
    for model in (ToyModel, Recomputing):
        engine = build_engine(model(2, rank, drop=True), {}, gradient_accumulation_steps=2)
        for training in (True, False, True):
            engine.train(training)
            said.append(_refused(engine, unequal))
            engine(equal)
        _step(engine, equal, equal[:, :8])
        assert engine.global_steps == 1
    groups = host_groups([gate.ep_group for gate in _gates(engine)], torch.device("meta"))
    for gate, group in zip(_gates(engine), groups, strict=True):
        assert group is not gate.ssr.peers
        gate.ssr.peers = group  # as on an accelerator
    said.append(_refused(engine, unequal))
    # Unequal numbers of tokens may have equal capacities.
    out = build_engine(ToyModel(2, rank, drop=True, min_capacity=32), {})(unequal)
    assert out.shape == unequal.shape
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    assert host_groups([None, alone], torch.device("meta")) == [None] * 2
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    with pytest.raises(RuntimeError, match=r"cannot meet over gloo \(.*: set GLOO_SOCKET_IFNAME"):
        host_group()
    del os.environ["GLOO_SOCKET_IFNAME"]
    return said


def test_unequal_numbers_of_tokens_are_an_error_on_every_rank_in_every_pass(tmp_path):
    first, second = run_ranks(2, _unequal_capacities, folder=tmp_path)
    assert first == second
    assert len(first) == 7
    for said in first:
        assert said.startswith(
            "router 0 got unequal numbers of tokens: 24 on rank 0 (capacity 12) and 16 on rank 1 (capacity 8)"
        )
        assert "drop_tokens=False" in said


def _unequal_batches(cut):
    """Outputs of two steps and the states after them; of the second row some tokens are left out."""
    ssr_deepspeed.install()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for block in (COUNTS, BEFORE):
        # Clipped, a step is another: DeepSpeed's norm of the experts' gradients depends on the number of ranks.
        engine = build_engine(ToyModel(ranks, rank), block, optimizer=SLOW, gradient_clipping=0.0)
        for step in range(2):
            rows = [_batch(step)[:1], _batch(step)[1:, :cut]]
            batch = torch.cat(rows, dim=1) if ranks == 1 else rows[rank]
            out = engine(batch)
            engine.backward(out.square().sum() * ranks / ((24 + cut) * WIDTH))
            engine.step()
            found.append((out.detach(), _states(engine)))
    return found


def test_ranks_with_unequal_numbers_of_tokens_that_drop_none_compute_what_one_process_does(tmp_path):
    (whole,) = run_ranks(1, _unequal_batches, 10, folder=tmp_path)
    first, second = run_ranks(2, _unequal_batches, 10, folder=tmp_path)
    for (out, states), (out_a, states_a), (out_b, states_b) in zip(whole, first, second, strict=True):
        torch.testing.assert_close(torch.cat([out_a, out_b], dim=1), out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states_a, states_b, rtol=0, atol=0)
        torch.testing.assert_close(states_a, states, rtol=1e-4, atol=1e-5)


def _content(engine, ep_size):
    """Steps taken, weights by global name, the rules' states, and what evaluation makes of this rank's row, or both."""
    rank = dist.get_rank()
    weights = {
        global_name(name, ep_size, rank % ep_size): weight.detach().clone()
        for name, weight in engine.module.named_parameters()
    }
    engine.eval()
    with torch.no_grad():
        out = engine(_batch(9, slice(rank, rank + 1) if dist.get_world_size() == 2 else slice(None)))
    engine.train()
    return engine.global_steps, weights, _states(engine), out


def _at_ep_size(ep_size, source, target):
    """What was loaded from `source`, if it is given, and what was saved to `target` after two more steps."""
    ssr_deepspeed.install()
    rank = dist.get_rank()
    row = slice(rank, rank + 1) if dist.get_world_size() == 2 else slice(None)
    engine = build_engine(ToyModel(ep_size, rank % ep_size, use_residual=True), COUNTS, optimizer=PLAIN)
    loaded = None
    if source:
        _step(engine, _batch(7, row))
        engine.load_checkpoint(source, load_module_strict=True, load_optimizer_states=False)
        loaded = _content(engine, ep_size)
    for step in range(2):
        _step(engine, _batch(step, row))
    engine.save_checkpoint(target)
    return loaded, _content(engine, ep_size)


def _joined(first, second):
    """What two ranks hold together, as one rank would."""
    assert first[0] == second[0]
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)
    return first[0], first[1] | second[1], first[2], torch.cat([first[3], second[3]])


def _same_content(saved, loaded):
    torch.testing.assert_close(loaded[:3], saved[:3], rtol=0, atol=0)
    torch.testing.assert_close(loaded[3], saved[3], rtol=1e-5, atol=1e-6)
    assert all(value.any() for state in loaded[2] for value in state.values())


def test_a_checkpoint_loads_at_another_number_of_expert_parallel_ranks_and_back(tmp_path):
    """Weights, steps and rules' states; not the optimizer's states, which DeepSpeed keeps by expert-parallel rank."""
    two, one, last = (str(tmp_path / name) for name in ("two", "one", "last"))
    (_, first), (_, second) = run_ranks(2, _at_ep_size, 2, None, two, folder=tmp_path)
    ((loaded, saved),) = run_ranks(1, _at_ep_size, 1, two, one, folder=tmp_path)
    _same_content(_joined(first, second), loaded)
    assert saved[0] == 4
    (first, _), (second, _) = run_ranks(2, _at_ep_size, 2, one, last, folder=tmp_path)
    _same_content(saved, _joined(first, second))


def _leaves_and_returns(folder):
    """From SSR to `TopKGate` and back by checkpoints, beside an engine that lives on without."""
    rank = dist.get_rank()
    part = slice(rank, rank + 1)

    def engine_of(block):
        model = ToyModel(2, rank, use_residual=True, **OFF)
        return build_engine(model, block, zero=1, optimizer=MOMENTUM, zero_allow_untested_optimizer=True)

    def train(engines, steps):
        for step in steps:
            for engine in engines:
                _step(engine, _batch(step, part))

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a.module.parameters(), b.module.parameters(), strict=True))

    def loaded(engine, path):
        train([engine], [9])
        before = engine.global_steps
        engine.load_checkpoint(path, load_module_strict=True)
        assert engine.global_steps > before
        return engine

    ssr_deepspeed.install()
    live = engine_of(COUNTS)
    train([live], range(2))
    live.save_checkpoint(f"{folder}/ssr")
    ssr_deepspeed.uninstall()
    plain = loaded(engine_of(None), f"{folder}/ssr")
    assert {type(gate) for gate in plain.gate_modules + live.gate_modules} == {TopKGate}
    assert equal(plain, live)
    train([plain, live], range(2, 4))
    assert equal(plain, live)
    plain.save_checkpoint(f"{folder}/plain")
    ssr_deepspeed.install()
    back = loaded(engine_of({"rule": "none"}), f"{folder}/plain")
    balanced = loaded(engine_of(COUNTS), f"{folder}/plain")
    assert equal(back, plain) and equal(balanced, plain)
    assert not any(value.any() for state in _states(balanced) for value in state.values())
    train([plain, back, balanced], range(4, 6))
    torch.testing.assert_close(list(back.module.parameters()), list(plain.module.parameters()), rtol=1e-4, atol=1e-5)
    assert not equal(balanced, back)


def test_a_run_leaves_ssr_for_topkgate_by_a_checkpoint_trains_on_and_returns(tmp_path):
    run_ranks(2, _leaves_and_returns, str(tmp_path), folder=tmp_path)
    saved = (tmp_path / "ssr" / "global_step2" / "mp_rank_00_model_states.pt").read_bytes()
    assert b"ssr_deepspeed_rules" in saved
    assert b"cssr_deepspeed" not in saved, "a pickled class of the plugin would have to be imported"


def _timed():
    """The times that the engine adds up, and the lines it logs of them."""
    ssr_deepspeed.install()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    engine = build_engine(ToyModel(), {}, wall_clock_breakdown=True)
    _step(engine, _batch(0))
    assert engine.gate_modules == _gates(engine)
    times = [(gate.gate_time, layer.time_moe) for gate, layer in zip(_gates(engine), engine.moe_layers, strict=True)]
    return times, [line for line in lines if "top_k: " in line]


def test_the_engines_wall_clock_breakdown_sees_the_gate(tmp_path):
    ((times, lines),) = run_ranks(1, _timed, folder=tmp_path)
    assert all(0 < gate < layer for gate, layer in times)
    (line,) = lines
    assert float(line.split("top_k: ")[1].split(")")[0]) == pytest.approx(sum(gate for gate, _ in times), abs=0.01)


@pytest.mark.parametrize("block", [{}, {"rule": "ssr", "probability": 1.0}], ids=["carried", "transport"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_gate_in_fp16_routes_by_the_fp32_product_of_what_it_is_given(k, block):
    half, whole = (SSRGate(WIDTH, EXPERTS, k, 1.25, config=SSRConfig.from_dict(block)) for _ in range(2))
    half.half()
    whole.load_state_dict(half.state_dict())
    tokens = torch.randn(64, WIDTH).half()
    logits = tokens.float() @ half.wg.weight.float().t()
    assert half.wg.weight.dtype == torch.float16
    for mine, expected, again in zip(
        half(tokens), whole(tokens.float()), whole.routes_of(logits, None, False), strict=True
    ):
        assert mine.dtype == expected.dtype and mine.dtype != torch.float16
        assert torch.equal(mine, expected)
        torch.testing.assert_close(again, expected)
    assert all(value.dtype == torch.float32 for value in half.ssr.rule.state.values())


def _overflowed(bad):
    ssr_deepspeed.install()
    for block in (COUNTS, LOSS_FREE):
        engine, other = (build_engine(ToyModel(), block, optimizer=PLAIN, **AUTOCAST) for _ in range(2))
        before = [weight.clone() for weight in engine.module.parameters()]
        states, scaler = _states(engine), engine.torch_autocast_z0_gradscaler
        scale = scaler.get_scale()
        spoilt = _batch(0)
        spoilt[0, 3] = bad
        _scaled_step(engine, spoilt, 2.0**-12)
        assert scaler.get_scale() == scale / 2, "it was the scaler that met it"
        torch.testing.assert_close(_states(engine), states, rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        for run in (engine, other):
            _scaled_step(run, _batch(1), 2.0**-12)
        torch.testing.assert_close(_states(engine), _states(other), rtol=0, atol=0)
        assert any(value.any() for state in _states(engine) for value in state.values())


@needs_torch_scaler
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_under_fp16_logits_that_overflow_cost_a_step_and_leave_no_trace_in_the_rules(bad, tmp_path):
    run_ranks(1, _overflowed, bad, folder=tmp_path)
