import fcntl
import json
import os
import shutil
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch.distributed as dist

from ssr_deepspeed.monitor.sinks import read_json_lines
from ssr_deepspeed.pretrain import train
from ssr_deepspeed.pretrain.config import load_run
from ssr_deepspeed.pretrain.prepare import prepare
from tests.gloo import run_ranks
from tests.pretrain.tiny import tiny_run


def _run(config, folder, existing="refuse", kill_at=None):
    if kill_at is not None:
        advance = train.Progress.advance

        def advance_or_die(self):
            advance(self)
            if self.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        train.Progress.advance = advance_or_die
    run = train.Run(config, Path(folder), existing)
    result = run.train()
    run.report()
    return result


def records(folder, kind):
    return [record for record in read_json_lines(folder / "metrics.jsonl") if record["kind"] == kind]


# What a machine does faster or slower each time.
OF_TIME = {
    "data_wait_share",
    "eta_seconds",
    "gate_time_share",
    "mfu",
    "model_flops_per_second",
    "peak_memory_bytes",
    "seconds",
    "step_seconds",
    "time",
    "tokens_per_second",
    "tokens_per_second_per_device",
}


def timeless(record):
    return {key: value for key, value in record.items() if key not in OF_TIME}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(cache, tmp_path, precision):
    """Losses, loads and evaluations of a run killed at step 7 and resumed from step 4."""
    extra = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    config = tiny_run(cache, steps=12, log_every=2, checkpoint_every=4, eval_every=4, deepspeed=extra)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(2, _run, config, str(whole), folder=tmp_path)
    with pytest.raises(BrokenProcessPool):
        run_ranks(2, _run, config, str(broken), "refuse", 7, folder=tmp_path)
    assert (broken / "checkpoints" / "latest").read_text() == "step_4"
    assert records(broken, "train")[-1]["step"] == 6
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    run_ranks(2, _run, config, str(broken), "resume", folder=tmp_path)
    for kind, count in (("train", 6), ("load", 6), ("evaluation", 4)):
        expected = [timeless(record) for record in records(whole, kind)]
        assert len(expected) == count
        assert [timeless(record) for record in records(broken, kind)] == expected
    seconds = [record["seconds"] for record in records(broken, "train")]
    assert seconds == sorted(seconds)
    assert sorted(path.name for path in (broken / "checkpoints").glob("step_*")) == ["step_12", "step_8"]


@pytest.mark.slow
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
    return train.Run(config, Path(folder))._evaluate(0)


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


def _refused(config, folder, *options):
    with pytest.raises(ValueError) as error:
        train.Run(config, Path(folder), *options)
    return dist.get_rank(), str(error.value)


def test_a_run_that_cannot_start_says_why_on_every_rank(cache, tmp_path):
    def messages(config, folder, *options):
        both = run_ranks(2, _refused, config, str(tmp_path / folder), *options, folder=tmp_path)
        assert both[0][1] == both[1][1]
        return both[0][1]

    assert "ranks = 4, but 2 started" in messages(tiny_run(cache, ranks=4), "a")
    assert "ep_size = 4 does not divide the 2 ranks" in messages(tiny_run(cache, model={"ep_size": 4}), "a")
    assert "no such file" in messages(tiny_run(cache, data={"source": "/nowhere.txt"}), "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(tiny_run(cache, seed=5).to_dict()))
    (tmp_path / "c" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert "holds a run already" in messages(tiny_run(cache), "c")
    assert "cannot resume: seed is 5" in messages(tiny_run(cache), "c", "resume")
    other = tiny_run(cache, seed=5, model={"top_k": 1}, data={"workers": 1})
    assert "cannot resume: model.top_k is 2" in messages(other, "c", "resume")
    other = tiny_run(cache, seed=5, data={"sequence_length": 32})
    assert "cannot resume: data.sequence_length is 64" in messages(other, "c", "resume")
    assert not (tmp_path / "b").exists()
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    assert "DatasetGenerationError" in messages(tiny_run(cache, data={"source": str(tmp_path / "latin.txt")}), "d")
    assert "holds no run" in messages(tiny_run(cache), "e", "refuse", [tmp_path / "nothing"])
    assert "less than one sequence" in messages(tiny_run(cache, data={"sequence_length": 10**6}), "f")
    broken = tiny_run(cache, data={"source": "/nowhere.txt"})
    assert "no such file" in messages(broken, "c", "overwrite")
    assert (tmp_path / "c" / "config.json").exists()


def _refused_on_two_hosts(configs, folder):
    os.environ["LOCAL_RANK"] = "0"  # each rank is the first of its host, and prepares there
    return _refused(configs[dist.get_rank()], folder)


@pytest.mark.slow
def test_text_that_differs_or_is_spoilt_on_one_host_stops_every_rank(cache, tmp_path):
    def message(*data):
        configs = [tiny_run(cache, data=settings) for settings in data]
        both = run_ranks(2, _refused_on_two_hosts, configs, str(tmp_path / "run"), folder=tmp_path)
        assert both[0][1] == both[1][1]
        assert not (tmp_path / "run").exists()
        return both[0][1]

    shutil.copytree(f"{cache}/speeches", tmp_path / "speeches")
    with (tmp_path / "speeches" / "0.txt").open("a") as file:
        file.write("One sentence more.")
    assert "ranks [1] have other text than rank 0: its fingerprint" in message({}, {"source": f"{tmp_path}/speeches"})
    folder = prepare(tiny_run(cache).data, output=tmp_path / "prepared")
    truncated = folder / "training_00000.bin"
    truncated.write_bytes(b"short")
    assert f"{truncated} has 5 bytes instead of" in message({}, {"prepared": str(folder)})


def test_a_folder_that_another_process_still_writes_to_is_refused(cache, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ((_, message),) = run_ranks(
            1, _refused, tiny_run(cache, model={"ep_size": 1}), str(tmp_path), "resume", folder=tmp_path
        )
    assert "another process is still writing" in message


def _resume_alone(config, folder):
    with pytest.raises(ValueError, match=r"was written by 2 ranks .* this run has 1 and 1: .*`--resume weights`"):
        train.Run(config, Path(folder), "resume")


def test_a_checkpoint_of_another_number_of_ranks_is_refused(cache, tmp_path):
    config = tiny_run(cache, steps=1, model={"ep_size": 1})
    run_ranks(2, _run, config, str(tmp_path / "run"), folder=tmp_path)
    run_ranks(1, _resume_alone, config, str(tmp_path / "run"), folder=tmp_path)


def _diverge(config, folder):
    run = train.Run(config, Path(folder))
    run.engine.module.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the training loss is nan in the steps up to 1"):
        run.train()


def test_a_run_that_diverges_stops_on_every_rank_and_can_still_be_reported(cache, tmp_path):
    run_ranks(2, _diverge, tiny_run(cache), str(tmp_path / "run"), folder=tmp_path)
    assert records(tmp_path / "run", "train")[-1]["loss"] is None
    assert '["training loss (last record)","- nats"]' in train.write_report(tmp_path / "run").read_text()


def _topkgate(config, folder):
    run = train.Run(config, Path(folder))
    return run.train()["bits_per_byte"]


def test_topkgate_trains_with_its_auxiliary_loss_and_is_counted(cache, tmp_path):
    for k in (1, 2):
        config = tiny_run(cache, steps=2, model={"top_k": k, "auxiliary_loss": 0.01}, ssr={"enabled": False})
        run_ranks(2, _topkgate, config, str(tmp_path / str(k)), folder=tmp_path)
        assert [record["step"] for record in records(tmp_path / str(k), "load")] == [1, 2]


def test_the_first_two_steps_are_those_of_a_shorter_run(cache, tmp_path):
    """More steps do not change the earlier ones, and a finished run can be made longer. Each keeps its checkpoints."""
    short, long = tmp_path / "short", tmp_path / "long"
    run_ranks(2, _run, tiny_run(cache, steps=2), str(short), folder=tmp_path)
    run_ranks(
        2, _run, tiny_run(cache, steps=4, checkpoint_every=1, keep_checkpoints=1), str(short), "resume", folder=tmp_path
    )
    run_ranks(2, _run, tiny_run(cache, steps=4, checkpoint_every=1, keep_checkpoints=3), str(long), folder=tmp_path)
    assert [timeless(r) for r in records(short, "train")] == [timeless(r) for r in records(long, "train")]
    kept = [sorted(path.name for path in (folder / "checkpoints").glob("step_*")) for folder in (short, long)]
    assert kept == [["step_4"], ["step_2", "step_3", "step_4"]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.layer=3"], "unknown key model.layer = 3; did you mean 'layers'"),
        (["steps=0"], "steps = 0; allowed: at least 1"),
        (["model.top_k=9"], "model.top_k = 9; allowed: 1 to experts = 8"),
        (["deepspeed.ssr.entropy=-1"], "deepspeed.ssr.entropy = -1.0; allowed: above 0"),
        (["deepspeed.ssr"], "write key.key=value"),
        (["data.tokenizer=words"], "data.tokenizer = 'words'"),
        (["timeout=0"], "timeout = 0.0; allowed: above 0"),
        (["deepspeed.use_data_before_expert_parallelism=true"], "use_data_before_expert_parallelism = true"),
        (["deepspeed.ssr.rule=auxiliary"], "model.auxiliary_loss = 0.0; allowed: above 0"),
        (["model.auxiliary_loss=0.1"], 'model.auxiliary_loss = 0.1; allowed: 0, for deepspeed.ssr.rule = "carried"'),
        (["model.dropout=1"], "model.dropout = 1.0; allowed: at least 0 and below 1"),
        (["peak_flops=0"], "peak_flops = 0.0; allowed: above 0, or null"),
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
