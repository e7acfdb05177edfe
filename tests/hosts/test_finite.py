import math

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

import ssr_deepspeed
import ssr_deepspeed.hosts.finite
from ssr_deepspeed.monitor.alerts import sentence
from ssr_deepspeed.monitor.records import RunLog
from tests.gloo import run_ranks
from tests.toy import WIDTH, ToyModel, build_engine


def _spoil_one_pass(bad, path):
    """Train three steps of two micro-batches; on rank 1 one token of the third step's first is not finite."""
    ssr_deepspeed.install()
    rank = dist.get_rank()
    block = {"rule": "ssr", "probability": 0.5, "monitor": {"path": path}}
    engine = build_engine(ToyModel(2, rank), block, gradient_accumulation_steps=2)
    for step in range(3):
        for micro_batch in range(2):
            tokens = torch.randn(1, 8, WIDTH)
            if (step, micro_batch, rank) == (2, 0, 1):
                tokens[0, 3, 0] = bad
            weights = [weight.clone() for weight in engine.module.parameters()]
            out = engine(tokens)
            engine.backward(out.nan_to_num().square().mean())
            try:
                engine.step()
            except RuntimeError as error:
                same = all(torch.equal(a, b) for a, b in zip(weights, engine.module.parameters(), strict=True))
                return step, micro_batch, str(error), same
    return None


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_every_rank_stops_before_the_step_and_names_layer_and_rank(bad, tmp_path):
    path = tmp_path / "loads.jsonl"
    results = run_ranks(2, _spoil_one_pass, bad, str(path), folder=tmp_path)
    assert results[0] == results[1]
    step, micro_batch, message, unchanged = results[0]
    assert (step, micro_batch) == (2, 1), "raised at the optimizer step, not within it"
    assert "layers.0.deepspeed_moe.gate were NaN or infinite on rank 1" in message
    assert "optimizer step 2" in message
    assert unchanged
    (alert,) = RunLog(path).raised()
    assert (alert["alert"], alert["layer"], alert["since"]) == ("nonfinite", "layers.0.deepspeed_moe.gate", 2)
    assert sentence(alert).startswith(
        "alert: nonfinite of layers.0.deepspeed_moe.gate in step 2, which stopped the run;"
    )


def _train_step(engine, bad=False):
    tokens = torch.randn(1, 8, WIDTH)
    tokens[0, 3, 0] = math.nan if bad else 0.0
    engine.backward(engine(tokens).nan_to_num().square().mean())
    engine.step()


def _one_step_later(folder):
    """As on an accelerator: the host looks at a step's flags when the next step comes, or a checkpoint is saved."""
    ssr_deepspeed.install()
    ssr_deepspeed.hosts.finite.to_host = lambda flags: (flags, None)

    def engine_of():
        engine = build_engine(ToyModel(), {}, zero=1)  # deepspeed 0.16.9 cannot load its MoE checkpoint without ZeRO
        engine.ssr._finite._reads_at_once = False
        return engine

    engine = engine_of()
    _train_step(engine)
    engine.save_checkpoint(folder)
    _train_step(engine, bad=True)
    with pytest.raises(RuntimeError, match=r"layers.0.*on rank 0 .*optimizer step 1"):
        _train_step(engine)
    # It goes on from its checkpoint in a new engine: ZeRO of deepspeed 0.17.6 takes no step after one that failed.
    engine = engine_of()
    engine.load_checkpoint(folder)
    _train_step(engine)
    _train_step(engine, bad=True)
    with pytest.raises(RuntimeError, match="optimizer step 2"):
        engine.save_checkpoint(folder)
    # Raised once; and loading a checkpoint drops what is on its way.
    _train_step(engine, bad=True)
    engine.load_checkpoint(folder)
    _train_step(engine)
    engine.save_checkpoint(folder)


def test_on_an_accelerator_the_flags_are_read_one_step_later(tmp_path):
    run_ranks(1, _one_step_later, str(tmp_path / "checkpoint"), folder=tmp_path)


def _not_asked(config):
    """fp16 by autocast: a real loss scaler skips the step that overflows."""
    ssr_deepspeed.install()
    engine = build_engine(ToyModel(), {}, **config)
    before = [weight.clone() for weight in engine.module.parameters()]
    engine(torch.full((1, 8, WIDTH), math.inf))
    assert all(gate.ssr.nonfinite is None for gate in engine.ssr.gates.values())
    engine.ssr.before_step(engine)
    return all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))


@pytest.mark.skipif(
    not hasattr(DeepSpeedEngine, "torch_autocast_enabled"), reason="this DeepSpeed has no torch_autocast"
)
def test_under_fp16_the_loss_scaler_deals_with_overflow(tmp_path):
    """Plain fp16, which not every CPU has, is asked for in the same way."""
    config = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    assert run_ranks(1, _not_asked, config, folder=tmp_path) == [True]


def _uninstalled_and_installed_again():
    ssr_deepspeed.install()
    engine = build_engine(ToyModel(), {})
    _train_step(engine)
    ssr_deepspeed.uninstall()
    _train_step(engine)
    ssr_deepspeed.install()
    _train_step(engine)


def test_an_engine_that_was_released_goes_on_without(tmp_path):
    run_ranks(1, _uninstalled_and_installed_again, folder=tmp_path)
