import math

import pytest
import torch
import torch.distributed as dist

import ssr_deepspeed
import ssr_deepspeed.hosts.finite
from tests.gloo import run_ranks
from tests.toy import WIDTH, ToyModel, build_engine


def _spoil_one_pass(bad):
    """Train three steps of two micro-batches; on rank 1 one token of the third step's first is not finite."""
    ssr_deepspeed.install()
    rank = dist.get_rank()
    engine = build_engine(ToyModel(2, rank), {"probability": 0.5}, gradient_accumulation_steps=2)
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_every_rank_stops_before_the_step_and_names_layer_and_rank(bad, tmp_path):
    results = run_ranks(2, _spoil_one_pass, bad, folder=tmp_path)
    assert results[0] == results[1]
    step, micro_batch, message, unchanged = results[0]
    assert (step, micro_batch) == (2, 1), "raised at the optimizer step, not within it"
    assert "layers.0.deepspeed_moe.gate were NaN or infinite on rank 1" in message
    assert "optimizer step 2" in message
    assert unchanged


def _one_step_later():
    """As on an accelerator: the host looks at a step's flags when the next step comes."""
    ssr_deepspeed.install()
    engine = build_engine(ToyModel(), {})
    watch = engine.ssr._finite
    watch._reads_at_once = False
    ssr_deepspeed.hosts.finite._to_host = lambda flags: (flags, None)
    gate = engine.module.layers[1].deepspeed_moe.gate
    watch.before_step(0)
    gate.ssr.nonfinite = torch.tensor(True)
    watch.before_step(1)
    with pytest.raises(RuntimeError, match=r"layers.1.*on rank 0 .*optimizer step 1"):
        watch.before_step(2)


def test_on_an_accelerator_the_flags_are_read_one_step_later(tmp_path):
    run_ranks(1, _one_step_later, folder=tmp_path)


def _under_fp16():
    ssr_deepspeed.install()
    engine = build_engine(ToyModel(), {})
    engine.fp16_enabled = lambda: True
    return ssr_deepspeed.hosts.engine.EngineRuntime(engine, engine.ssr.config, {}, {"a": 4}, None)._finite


def test_under_fp16_the_loss_scaler_deals_with_overflow(tmp_path):
    """The CPU engine refuses fp16 itself: only the decision is tested here."""
    assert run_ranks(1, _under_fp16, folder=tmp_path) == [None]
