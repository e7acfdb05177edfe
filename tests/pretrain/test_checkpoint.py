import contextlib
import io
import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssr_deepspeed.pretrain import checkpoint, train
from ssr_deepspeed.pretrain.manifest import choose
from ssr_deepspeed.pretrain.signals import Agreement, Stopped
from tests.gloo import run_ranks
from tests.pretrain.test_train import records, timeless
from tests.pretrain.tiny import tiny_run
from tests.toy import global_name


def _run(config, folder, existing="refuse", stop_in=None):
    """Train; where rank 1 is asked to stop before a step, until all ranks have."""
    run = train.Run(config, Path(folder), existing, asked=lambda: _signal_of(run, stop_in))
    try:
        return run.train(), None
    except Stopped as stopped:
        return None, stopped.step


def _signal_of(run, step):
    return 15 if dist.get_rank() == 1 and step is not None and run.engine.global_steps >= step - 1 else 0


def assert_equal_runs(folder, whole):
    for kind in ("train", "load", "experts", "evaluation"):
        assert [timeless(record) for record in records(folder, kind)] == [
            timeless(record) for record in records(whole, kind)
        ], kind


def settings_of(cache, **changes):
    return tiny_run(
        cache,
        **{
            "ssr": {"rule": "carried", "noise": {"scale": 0.1}},
            "steps": 6,
            "log_every": 3,
            "checkpoint_every": 2,
            "eval_every": 2,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """A run that nothing befalls, of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(2, _run, settings_of(cache), str(folder / "run"), folder=folder)
    return folder / "run"


def test_a_run_stopped_between_two_records_writes_the_records_of_one_that_was_not(cache, tmp_path, whole):
    """Stopped after step 4 of 6, with its losses on the way to the record of step 6, and its evaluation owed."""
    folder = tmp_path / "run"
    both = run_ranks(2, _run, settings_of(cache), str(folder), "refuse", 4, folder=tmp_path)
    assert both == [(None, 4), (None, 4)]
    assert records(folder, "train")[-1]["step"] == 3
    assert records(folder, "evaluation")[-1]["step"] == 2
    run_ranks(2, _run, settings_of(cache), str(folder), "resume", folder=tmp_path)
    assert_equal_runs(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bf16", {"deepspeed": {"bf16": {"enabled": True}}}),
        ("schedule", {"deepspeed": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}}),
        ("zero 0", {"deepspeed": {"zero_optimization": {"stage": 0}}}),
        ("zero 2", {"deepspeed": {"zero_optimization": {"stage": 2}}}),
        ("ssr", {"ssr": {"rule": "ssr", "probability": 0.5, "noise": {"scale": 0.1}}}),
        ("ep 1", {"model": {"ep_size": 1}}),
    ],
)
def test_stopped_at_any_step_it_goes_on_bit_for_bit(cache, tmp_path, name, changes):
    config = settings_of(cache, **changes)
    run_ranks(2, _run, config, str(tmp_path / "whole"), folder=tmp_path)
    run_ranks(2, _run, config, str(tmp_path / "run"), "refuse", 2, folder=tmp_path)
    for step in (4, 5):
        run_ranks(2, _run, config, str(tmp_path / "run"), "resume", step, folder=tmp_path)
    run_ranks(2, _run, config, str(tmp_path / "run"), "resume", folder=tmp_path)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def spoil(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


def _heard(*arguments):
    """What a rank says while it runs."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        _run(*arguments)
    return said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mp_rank_00_model_states.pt", "one bit"),
        ("*optim_states.pt", "truncated"),
        ("layer_1_expert_3_*", "missing"),
        ("rank_1.pt", "empty"),
        ("manifest.json", "one bit"),
        ("manifest.json", "missing"),
    ],
)
def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(cache, tmp_path, whole, name, how):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    spoil(next((folder / "checkpoints" / "step_6").glob(name)), how)
    said = "".join(run_ranks(2, _heard, settings_of(cache), str(folder), "resume", folder=tmp_path))
    assert said.count("step_6 is damaged (") == said.count("going on from the one before, of step 4") == 1
    assert_equal_runs(folder, whole)
    names = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert names == ["step_4", "step_6", "step_6.damaged"]


def _refused(config, folder, existing):
    with pytest.raises(ValueError) as error:
        train.Run(config, Path(folder), existing)
    return str(error.value)


@pytest.mark.slow
def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew(cache, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step, how in (("step_4", "truncated"), ("step_6", "missing")):
        spoil(folder / "checkpoints" / step / "rank_0.pt", how)
    before = (folder / "metrics.jsonl").read_text()
    first, second = run_ranks(2, _refused, settings_of(cache), str(folder), "resume", folder=tmp_path)
    assert first == second
    assert "step_6 is damaged (rank_0.pt cannot be read" in first
    assert "step_4 is damaged (rank_0.pt has " in first
    assert "no checkpoint of this run is whole" in first
    assert (folder / "metrics.jsonl").read_text() == before


def _evaluate_resumed(config, folder, existing):
    run = train.Run(config, Path(folder), existing)
    state = (run.first_step, run.samples, run.engine.get_lr()[0], run.engine.lr_scheduler.last_batch_iteration)
    return state, run._evaluate(0, final=True)["bits_per_byte"]


def _train_resumed(config, folder, existing):
    return train.Run(config, Path(folder), existing).train()["bits_per_byte"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "deepspeed",
    [{}, {"zero_optimization": {"stage": 0}}, {"bf16": {"enabled": True}}],
    ids=["zero 1", "zero 0", "bf16"],
)
def test_weights_steps_and_data_go_on_at_another_layout(cache, tmp_path, deepspeed):
    """From 2 ranks that share the experts to 1 rank, and to 2 that do not. The next steps keep what was learnt."""
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}}
    changes = {"deepspeed": {**schedule, **deepspeed}, "steps": 30, "checkpoint_every": 0, "eval_every": 0}
    generous = {"eval_capacity_factor": 4.0}
    config = settings_of(cache, model=generous, **changes)
    ((expected, _), _) = run_ranks(2, _run, config, str(tmp_path / "run"), folder=tmp_path)
    for ranks in (1, 2):
        folder = tmp_path / f"on_{ranks}"
        shutil.copytree(tmp_path / "run", folder)
        other = settings_of(cache, model={**generous, "ep_size": 1}, **changes)
        refusals = run_ranks(ranks, _refused, other, str(folder), "resume", folder=tmp_path)
        assert set(refusals) == {refusals[0]}
        assert f"by 2 ranks with model.ep_size = 2; this run has {ranks} and 1" in refusals[0]
        assert "`--resume weights`" in refusals[0]
        found = run_ranks(ranks, _evaluate_resumed, other, str(folder), "weights", folder=tmp_path)
        state, bits = found[0]
        assert state == (30, 30 * 16, pytest.approx(1e-2), 29)
        tolerance = 2e-3 if deepspeed.get("bf16") else 1e-5  # another order of sums rounds otherwise
        assert bits == pytest.approx(expected["bits_per_byte"], abs=tolerance)
        longer = settings_of(cache, model={**generous, "ep_size": 1}, **{**changes, "steps": 34})
        bits = run_ranks(ranks, _train_resumed, longer, str(folder), "weights", folder=tmp_path)[0]
        assert bits < expected["bits_per_byte"] + 0.05
        # What was written at this layout resumes as it is.
        run_ranks(ranks, _evaluate_resumed, longer, str(folder), "resume", folder=tmp_path)


def _weights_after(config, folder, existing):
    """This rank's weights after the run's last step, by names that are the same at every layout; and where it began."""
    run = train.Run(config, Path(folder), existing)
    run.train()
    ep_size = config.model.ep_size
    names = {global_name(name, ep_size, run.rank % ep_size): one for name, one in run.engine.module.named_parameters()}
    return {name: weight.detach().clone() for name, weight in names.items()}, (run.first_step, run.engine.global_steps)


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (2, 2)), pytest.param((4, 2), (2, 2), marks=pytest.mark.slow)],
    ids=["1 rank to 2", "4 ranks to 2"],
)
def test_more_or_fewer_ranks_take_over_every_weight_as_it_is(cache, tmp_path, before, after):
    """Also those that ZeRO keeps beside the model's: a step at a learning rate of 0 changes none."""
    folder, found = str(tmp_path / "run"), []
    still = {"optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}}}
    for (ranks, ep_size), existing, steps, deepspeed in ((before, "refuse", 2, {}), (after, "weights", 3, still)):
        changes = {"steps": steps, "checkpoint_every": 0, "eval_every": 0, "deepspeed": deepspeed}
        config = settings_of(cache, model={"ep_size": ep_size}, **changes)
        by_rank = run_ranks(ranks, _weights_after, config, folder, existing, folder=tmp_path)
        found.append({})
        for weights, _ in by_rank:
            for name, weight in weights.items():
                assert torch.equal(found[-1].setdefault(name, weight), weight), name
    assert by_rank[0][1] == (2, 3)
    assert sum("deepspeed_experts" in name for name in found[0]) == 2 * 4 * 3  # layers, experts, matrices
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def _fail_to_write(config, folder, failing):
    """A rank whose writes fail: the problem as each rank is told, and what a second try says."""
    run = train.Run(config, Path(folder))
    run.engine.global_steps = 1
    writes = checkpoint._Writer._save
    if dist.get_rank() == failing:

        def full(self, state, path):
            raise OSError(28, "No space left on device", str(path))

        checkpoint._Writer._save = full
    first = run.checkpoints.save(16, 1.0, [torch.ones(())], False)
    left = sorted(path.name for path in run.checkpoints.folder.iterdir())
    dist.barrier()
    checkpoint._Writer._save = writes
    return first, left, run.checkpoints.save(16, 1.0, [], False)


@pytest.mark.slow
def test_a_write_that_fails_on_one_rank_is_told_by_all_and_can_be_tried_again(cache, tmp_path):
    for failing in (0, 1):
        folder = tmp_path / f"fails_on_{failing}"
        both = run_ranks(2, _fail_to_write, tiny_run(cache), str(folder), failing, folder=tmp_path)
        assert both[0][0] == both[1][0]
        assert f"step 1 could not be written (rank {failing}, No space left on device: " in both[0][0]
        assert not [name for name in both[0][1] if name.startswith(("step_", "latest"))]
        assert [again for _, _, again in both] == [None, None]
        assert json.loads((folder / "checkpoints/step_1/manifest.json").read_text())["checkpoint"]["samples"] == 16


def _save_again(config, folder):
    run = train.Run(config, Path(folder))
    run.engine.global_steps = 1
    said = [run.checkpoints.save(16, 1.0, [], False)]
    replace = checkpoint.replace_text

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    checkpoint.replace_text = full
    said.append(run.checkpoints.save(32, 1.0, [], False))
    checkpoint.replace_text = replace
    return said, choose(run.checkpoints.folder)


@pytest.mark.slow
def test_a_step_that_is_saved_again_is_there_even_where_latest_cannot_be_written(cache, tmp_path):
    for said, (manifest, damages) in run_ranks(2, _save_again, tiny_run(cache), str(tmp_path / "run"), folder=tmp_path):
        assert said == [None, None]
        assert (manifest.step, manifest.samples, damages) == (1, 32, [])
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == ["step_1"]


def _save_apart(config, folder):
    run = train.Run(config, Path(folder))
    run.engine.global_steps = 1
    if dist.get_rank() == 1:
        run.checkpoints.folder = run.checkpoints.folder.with_name("of_another_machine")
    return run.checkpoints.save(16, 1.0, [], False)


@pytest.mark.slow
def test_a_folder_that_the_machines_do_not_share_is_told_at_the_first_checkpoint(cache, tmp_path):
    first, second = run_ranks(2, _save_apart, tiny_run(cache), str(tmp_path / "run"), folder=tmp_path)
    assert first == second
    assert "put --output on a shared file system" in first
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def _agree():
    asked = [0]
    stop = Agreement(lambda: asked[0], timedelta(seconds=60))
    before = stop.at_once()
    stop.ask()
    asked[0] = 12 if dist.get_rank() == 1 else 0
    return before, stop.agreed(), stop.at_once()


@pytest.mark.slow
def test_one_rank_that_is_asked_to_stop_is_heard_by_all_when_they_next_ask(tmp_path):
    assert run_ranks(2, _agree, folder=tmp_path) == [(0, 0, 12)] * 2
