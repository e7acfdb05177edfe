"""Steps that torch's own loss scaler skips: DeepSpeed's fp16 by autocast without ZeRO, which runs on the CPU too."""

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

import ssr_deepspeed
from tests.gloo import run_ranks
from tests.hosts.test_rules import COUNTS, LOSS_FREE, STILL, TRIGGER, _batch, _states
from tests.toy import ToyModel, build_engine

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
pytestmark = pytest.mark.skipif(
    "torch_autocast_z0_gradscaler" not in DeepSpeedEngine.__init__.__code__.co_names,
    reason="this DeepSpeed does not use torch's loss scaler",
)


def _step(engine, batch, weight):
    torch.manual_seed(0)
    engine.backward(weight * engine(batch).square().mean())
    engine.step()


def _skipped_by_torch():
    ssr_deepspeed.install()
    for block in (COUNTS, LOSS_FREE, {"rule": "noisy"}, TRIGGER):
        engine, other = (build_engine(ToyModel(), block, optimizer=STILL, **AUTOCAST) for _ in range(2))
        before, scaler = _states(engine), engine.torch_autocast_z0_gradscaler
        scale = scaler.get_scale()
        _step(engine, _batch(0), 2.0**100)
        assert scaler.get_scale() == scale / 2, "it overflowed"
        assert engine.was_step_applied(), "as the engine says of a step that its optimizer did not take"
        torch.testing.assert_close(_states(engine), before, rtol=0, atol=0)
        for run in (engine, other):
            _step(run, _batch(1), 2.0**-12)
        assert scaler.get_scale() == scale / 2, "it did not overflow"
        # Gradients come through fp16, at one scale and at half of it.
        torch.testing.assert_close(_states(engine), _states(other), rtol=1e-2, atol=1e-6)
        assert any(value.any() for state in _states(engine) for value in state.values())


def test_a_step_that_torchs_own_scaler_skips_commits_nothing_and_the_next_good_one_does(tmp_path):
    run_ranks(1, _skipped_by_torch, folder=tmp_path)


def _skipped_by_one():
    """Scale and states after a step at which the second rank's experts alone overflow, and after a good one."""
    ssr_deepspeed.install()
    rank = dist.get_rank()
    model = ToyModel(2, rank, moe_layers=1)
    for name, weight in model.named_parameters():
        if rank == 1 and name.endswith((".0.weight", ".2.weight")):  # of the experts
            weight.data *= 64 if name.endswith(".0.weight") else 1 / 64
    engine = build_engine(model, LOSS_FREE, optimizer=STILL, **AUTOCAST)
    found = []
    for weight in (2.0**-4, 2.0**-20):
        _step(engine, _batch(0, slice(rank, rank + 1)), weight)
        found.append((engine.torch_autocast_z0_gradscaler.get_scale(), _states(engine)))
    return found


def test_a_step_that_torchs_own_scaler_skips_on_one_rank_commits_nothing_on_any(tmp_path):
    (skipped, good), (other_skipped, other_good) = run_ranks(2, _skipped_by_one, folder=tmp_path)
    assert skipped[0] == good[0] == 2 * other_skipped[0] == 2 * other_good[0], "the second rank alone skipped a step"
    torch.testing.assert_close([good[1], skipped[1]], [other_good[1], other_skipped[1]], rtol=0, atol=0)
    assert not any(value.any() for state in skipped[1] for value in state.values())
    assert all(value.any() for state in good[1] for value in state.values())
