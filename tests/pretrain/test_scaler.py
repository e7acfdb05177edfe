"""Steps that are skipped, loss scales, and how they outlive a checkpoint."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ssr_deepspeed.hosts.scaler import torch_scaler
from ssr_deepspeed.pretrain import train
from ssr_deepspeed.pretrain.signals import Stopped
from tests.gloo import run_ranks
from tests.pretrain.test_checkpoint import assert_equal_runs, settings_of
from tests.pretrain.test_train import records
from tests.pretrain.tiny import tiny_run


def _overflow(engine, weights, steps):
    """In these steps, counted from 1, the weights' gradients are infinite."""

    def spoil(gradient):
        return torch.full_like(gradient, math.inf) if engine.global_steps + 1 in steps else gradient

    for weight in weights:
        weight.register_hook(spoil)


def _run(config, folder, existing, overflows, stop_in=None):
    """Train, or until asked to stop in a step; torch's scaler at the beginning and at the end."""
    run = train.Run(config, Path(folder), existing, asked=lambda: 15 if run.engine.global_steps + 1 == stop_in else 0)
    scaler = torch_scaler(run.engine)
    before = scaler and scaler.state_dict()
    _overflow(run.engine, run.engine.module.parameters(), overflows)
    try:
        run.train()
    except Stopped as stopped:
        assert stopped.step == stop_in
    return before, scaler and scaler.state_dict()


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
FP16 = {"fp16": {"enabled": True, "hysteresis": 1}}


@pytest.mark.parametrize(
    ("ranks", "precision", "zero"),
    [
        (1, AUTOCAST, {"stage": 0}),
        pytest.param(2, AUTOCAST, {"stage": 0}, marks=pytest.mark.slow),
        # Where ZeRO looks for a norm it skips such a step by itself, and the scale stays.
        pytest.param(2, AUTOCAST, {"stage": 1, "compute_grad_norm": False}, marks=pytest.mark.slow),
        pytest.param(2, FP16, {"stage": 0}, marks=pytest.mark.slow),
        pytest.param(2, FP16, {"stage": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_loss_scale_that_fell_goes_on_after_a_checkpoint(cache, tmp_path, ranks, precision, zero):
    if precision is FP16 and not get_accelerator().is_fp16_supported():
        pytest.skip("this CPU has no fp16")
    deepspeed = {"zero_optimization": zero, "gradient_clipping": 0.0, **precision}
    config = settings_of(cache, model={"ep_size": ranks}, deepspeed=deepspeed, log_every=1, eval_every=0)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    run_ranks(ranks, _run, config, str(whole), "refuse", {2}, folder=tmp_path)
    stopped = run_ranks(ranks, _run, config, str(folder), "refuse", {2}, 4, folder=tmp_path)
    resumed = run_ranks(ranks, _run, config, str(folder), "resume", set(), folder=tmp_path)
    assert [before for before, _ in resumed] == [after for _, after in stopped]
    found = records(folder, "train")
    assert [record["skipped_steps"] for record in found] == [0, 1, 1, 1, 1, 1]
    scales = [record["loss_scale"] for record in found]
    assert scales[0] > scales[1] == scales[-1]
    assert_equal_runs(folder, whole)


def _run_with_one_bad_gradient(config, folder):
    """In step 3, of one expert on the last rank; whether each step but the first leaves that expert as it was."""
    run = train.Run(config, Path(folder))
    weight = next(one for name, one in run.engine.module.named_parameters() if "deepspeed_experts.0" in name)
    after = []
    if dist.get_rank() == dist.get_world_size() - 1:
        _overflow(run.engine, [weight], {3})
    advance = train.Progress.advance

    def look(self):
        advance(self)
        after.append(weight.detach().clone())

    train.Progress.advance = look
    run.train()
    return [torch.equal(one, other) for one, other in itertools.pairwise(after)]


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_zero_leaves_out_a_step_in_fp32_with_an_infinite_gradient_and_the_run_goes_on(cache, tmp_path, stage):
    config = tiny_run(cache, steps=4, deepspeed={"zero_optimization": {"stage": stage}})
    both = run_ranks(2, _run_with_one_bad_gradient, config, str(tmp_path / "run"), folder=tmp_path)
    assert both == [[False, True, False]] * 2
    found = records(tmp_path / "run", "train")
    assert [record["skipped_steps"] for record in found] == [0, 0, 1, 1]
    assert [record["gradient_norm"] is None for record in found] == [False, False, True, False]
    assert all(math.isfinite(record["loss"]) for record in found)
    assert not any("loss_scale" in record for record in found)
