import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch.distributed as dist

from ssr_deepspeed.monitor.sinks import read_json_lines
from ssr_deepspeed.pretrain import train
from ssr_deepspeed.pretrain.config import load_run
from tests.gloo import run_ranks
from tests.pretrain.tiny import tiny_run


def _run(config, folder, resume=False, kill_at=None):
    if kill_at is not None:
        advance = train.Progress.advance

        def advance_or_die(self):
            advance(self)
            if self.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        train.Progress.advance = advance_or_die
    run = train.Run(config, Path(folder), resume)
    result = run.train()
    run.report([])
    return result


def records(folder, kind):
    return [record for record in read_json_lines(folder / "metrics.jsonl") if record["kind"] == kind]


def timeless(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_bit_for_bit(cache, tmp_path, precision):
    """Losses, loads and the last evaluation of a run killed at step 7 and resumed from step 6."""
    extra = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    config = tiny_run(cache, steps=10, checkpoint_every=3, eval_every=3, deepspeed=extra)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(2, _run, config, str(whole), folder=tmp_path)
    with pytest.raises(BrokenProcessPool):
        run_ranks(2, _run, config, str(broken), False, 7, folder=tmp_path)
    assert (broken / "checkpoints" / "latest").read_text() == "step_6"
    assert records(broken, "train")[-1]["step"] == 6
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    run_ranks(2, _run, config, str(broken), True, folder=tmp_path)
    for kind, count in (("train", 10), ("load", 10), ("evaluation", 4)):
        expected = [timeless(record) for record in records(whole, kind)]
        assert len(expected) == count
        assert [timeless(record) for record in records(broken, kind)] == expected
    assert sorted(path.name for path in (broken / "checkpoints").glob("step_*")) == ["step_10", "step_9"]


def test_zero_stages_and_precisions_train_alike(cache, tmp_path):
    losses = {}
    for name, extra in {
        "zero 0": {"zero_optimization": {"stage": 0}},
        "zero 1": {"zero_optimization": {"stage": 1}},
        "zero 2": {"zero_optimization": {"stage": 2}},
        "bf16": {"bf16": {"enabled": True}},
    }.items():
        config = tiny_run(cache, steps=12, deepspeed=extra, ssr={"noise": {"scale": 0.0}})
        run_ranks(2, _run, config, str(tmp_path / name), folder=tmp_path)
        losses[name] = [record["loss"] for record in records(tmp_path / name, "train")]
    for name in ("zero 1", "zero 2", "bf16"):
        assert losses[name] == pytest.approx(losses["zero 0"], rel=0.05 if name == "bf16" else 2e-3)
    assert losses["zero 0"][-1] < losses["zero 0"][0] - 1


def _evaluate_only(config, folder):
    return train.Run(config, Path(folder), resume=False)._evaluate(0)


def test_bits_per_byte_do_not_depend_on_ranks_or_batch_sizes(cache, tmp_path):
    results = []
    for ranks, micro in ((1, 4), (2, 4), (2, 7)):
        config = tiny_run(
            cache,
            model={"ep_size": ranks, "eval_capacity_factor": 4.0},
            deepspeed={"train_micro_batch_size_per_gpu": micro},
        )
        folder = str(tmp_path / f"{ranks}_{micro}")
        results += run_ranks(ranks, _evaluate_only, config, folder, folder=tmp_path)
    for result in results:
        assert result["tokens"] == results[0]["tokens"] > 3_000
        assert result["bits_per_byte"] == pytest.approx(results[0]["bits_per_byte"], abs=1e-5)
        assert result["max_vio"] == pytest.approx(results[0]["max_vio"], abs=2e-3)
    assert results[0]["bits_per_byte"] == pytest.approx(8.0, abs=0.3)


def _refused(config, folder, resume):
    with pytest.raises(ValueError) as error:
        train.Run(config, Path(folder), resume)
    return dist.get_rank(), str(error.value)


def test_a_run_that_cannot_start_says_why_on_every_rank(cache, tmp_path):
    def messages(config, folder, resume=False):
        both = run_ranks(2, _refused, config, str(tmp_path / folder), resume, folder=tmp_path)
        assert both[0][1] == both[1][1]
        return both[0][1]

    assert "ep_size = 4 does not divide the 2 ranks" in messages(tiny_run(cache, model={"ep_size": 4}), "a")
    assert "no such file" in messages(tiny_run(cache, data={"source": "/nowhere.txt"}), "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(tiny_run(cache, seed=5).to_dict()))
    assert "holds a run already" in messages(tiny_run(cache), "c")
    assert "cannot resume: seed is 5" in messages(tiny_run(cache), "c", True)
    other = tiny_run(cache, seed=5, model={"top_k": 1}, data={"workers": 1})
    assert "cannot resume: model.top_k is 2" in messages(other, "c", True)
    assert not (tmp_path / "b").exists()


def _resume_alone(config, folder):
    with pytest.raises(ValueError, match="was written by 2 ranks; this run has 1"):
        train.Run(config, Path(folder), resume=True)


def test_a_checkpoint_of_another_number_of_ranks_is_refused(cache, tmp_path):
    config = tiny_run(cache, steps=1, model={"ep_size": 1})
    run_ranks(2, _run, config, str(tmp_path / "run"), folder=tmp_path)
    run_ranks(1, _resume_alone, config, str(tmp_path / "run"), folder=tmp_path)


def test_the_first_two_steps_are_those_of_a_shorter_run(cache, tmp_path):
    """More steps do not change the earlier ones, and a finished run can be made longer."""
    short, long = tmp_path / "short", tmp_path / "long"
    run_ranks(2, _run, tiny_run(cache, steps=2), str(short), folder=tmp_path)
    run_ranks(2, _run, tiny_run(cache, steps=4), str(short), True, folder=tmp_path)
    run_ranks(2, _run, tiny_run(cache, steps=4), str(long), folder=tmp_path)
    assert [timeless(r) for r in records(short, "train")] == [timeless(r) for r in records(long, "train")]


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[2].glob("configs/pretrain/*.json")), ids=lambda f: f.stem
)
def test_every_shipped_run_file_is_valid(file):
    assert load_run(str(file), []) == load_run(file.stem, [])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.layer=3"], "unknown key model.layer = 3; did you mean 'layers'"),
        (["steps=0"], "steps = 0; allowed: at least 1"),
        (["model.top_k=9"], "model.top_k = 9; allowed: 1 to experts = 8"),
        (["deepspeed.ssr.entropy=-1"], "deepspeed.ssr.entropy = -1.0; allowed: above 0"),
        (["deepspeed.ssr"], "write key.key=value"),
        (["data.tokenizer=words"], "data.tokenizer = 'words'"),
        (["model.ep_size=3"], "model.ep_size = 3; allowed: divisors of experts = 8"),
    ],
)
def test_wrong_settings_are_named(overrides, words):
    with pytest.raises(ValueError, match=words):
        load_run("tiny_cpu", overrides)


def test_an_unknown_run_file_lists_the_known():
    with pytest.raises(ValueError, match=r"no configuration file 'tiny'.*tiny_cpu"):
        load_run("tiny", [])


def test_overrides_reach_nested_keys():
    config = load_run("tiny_cpu", ["deepspeed.ssr.probability=0", "steps=7", "data.source=./x"])
    assert config.deepspeed["ssr"]["probability"] == 0
    assert (config.steps, config.data.source) == (7, "./x")
