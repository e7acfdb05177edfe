"""Steps that torch's own loss scaler skips: DeepSpeed's fp16 by autocast, which runs on the CPU too."""

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

import ssr_deepspeed
from tests.gloo import run_ranks
from tests.hosts.test_rules import COUNTS, LOSS_FREE, STILL, TRIGGER, _batch, _states
from tests.toy import ToyModel, build_engine

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
pytestmark = pytest.mark.skipif(
    "torch_autocast_z0_gradscaler" not in DeepSpeedEngine.__init__.__code__.co_names,
    reason="this DeepSpeed does not use torch's loss scaler",
)


# Newer ZeRO skips a step whose gradients have no norm before torch's scaler sees it; where they have none asked for,
# that scaler judges alone.
NO_NORMS = {"compute_grad_norm": False} if "compute_grad_norm" in DeepSpeedZeroConfig.model_fields else {}
STAGES = [{"stage": 0}, {"stage": 1}, {"stage": 1, **NO_NORMS}, {"stage": 2, **NO_NORMS}]


def _engine(model, block, zero):
    return build_engine(
        model,
        block,
        optimizer=STILL,
        zero_optimization=zero,
        gradient_clipping=0.0,
        zero_allow_untested_optimizer=True,
        **AUTOCAST,
    )


def _scaler(engine):
    return engine.torch_autocast_z0_gradscaler or engine.optimizer.torch_autocast_gradscaler


def _step(engine, batch, weight):
    torch.manual_seed(0)
    engine.backward(weight * engine(batch).square().mean())
    engine.step()


def _skipped_by_torch(zero):
    ssr_deepspeed.install()
    for block in (COUNTS, LOSS_FREE, {"rule": "noisy"}, TRIGGER):
        engine, other = _engine(ToyModel(), block, zero), _engine(ToyModel(), block, {"stage": 0})
        before, scaler = _states(engine), _scaler(engine)
        scale = scaler.get_scale()
        _step(engine, _batch(0), 2.0**100)
        lower = scaler.get_scale()
        # The engine says so even of a step that its optimizer did not take.
        assert engine.was_step_applied() == (lower < scale), "it overflowed"
        assert lower < scale or zero == {"stage": 1}
        torch.testing.assert_close(_states(engine), before, rtol=0, atol=0)
        for run in (engine, other):
            _step(run, _batch(1), 2.0**-12)
        assert scaler.get_scale() == lower, "it did not overflow"
        # Gradients come through fp16, at one scale and at half of it.
        torch.testing.assert_close(_states(engine), _states(other), rtol=1e-2, atol=1e-6)
        assert any(value.any() for state in _states(engine) for value in state.values())


@pytest.mark.parametrize("zero", STAGES, ids=str)
def test_a_step_that_torchs_own_scaler_skips_commits_nothing_and_the_next_good_one_does(tmp_path, zero):
    run_ranks(1, _skipped_by_torch, zero, folder=tmp_path)


def _skipped_by_one(zero):
    """Scale and states after a step at which the second rank's experts alone overflow, and after a good one."""
    ssr_deepspeed.install()
    rank = dist.get_rank()
    model = ToyModel(2, rank, moe_layers=1)
    for name, weight in model.named_parameters():
        if rank == 1 and name.endswith((".0.weight", ".2.weight")):  # of the experts
            weight.data *= 64 if name.endswith(".0.weight") else 1 / 64
    engine = _engine(model, LOSS_FREE, zero)
    found = []
    for weight in (2.0**-4, 2.0**-20):
        _step(engine, _batch(0, slice(rank, rank + 1)), weight)
        found.append((_scaler(engine).get_scale(), _states(engine)))
    return found


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 1, **NO_NORMS}], ids=str)
def test_a_step_that_torchs_own_scaler_skips_on_one_rank_commits_nothing_on_any(tmp_path, zero):
    (skipped, good), (other_skipped, other_good) = run_ranks(2, _skipped_by_one, zero, folder=tmp_path)
    assert skipped[0] == good[0] == 2 * other_skipped[0] == 2 * other_good[0], "the second rank alone skipped a step"
    torch.testing.assert_close([good[1], skipped[1]], [other_good[1], other_skipped[1]], rtol=0, atol=0)
    assert not any(value.any() for state in skipped[1] for value in state.values())
    assert all(value.any() for state in good[1] for value in state.values())
