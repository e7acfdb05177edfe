"""Every entry point as a user starts it: the commands of tests/examples, on two processes, stopped and resumed."""

import glob
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from ssr_deepspeed.hosts.rules import KEY

ROOT = Path(__file__).parents[1]
TORCHRUN = "torchrun --standalone --nproc_per_node 2"
# By script: a run, and how it goes on after half of it, started in another way.
COMMANDS = {
    "plain": (
        f"{TORCHRUN} tests/examples/plain_loop.py",
        "deepspeed --num_gpus 2 tests/examples/plain_loop.py --resume",
    ),
    "trainer": (
        f"{TORCHRUN} -m ssr_deepspeed.run tests/examples/trainer.py",
        "deepspeed --num_gpus 2 --module ssr_deepspeed.run tests/examples/trainer.py --resume",
    ),
    "accelerate": (
        "accelerate launch --config_file tests/examples/accelerate.yaml -m ssr_deepspeed.run "
        "tests/examples/accelerate_loop.py",
        f"{TORCHRUN} -m ssr_deepspeed.run tests/examples/accelerate_loop.py --deepspeed tests/examples/ds.json "
        "--resume runs/accelerate/step_10",
    ),
}
ROUTER = {"plain": "SSRGate", "trainer": "SSRQwen3MoeTopKRouter", "accelerate": "SSRQwen3MoeTopKRouter"}
# Where a step's checkpoint has the module's state.
STATE = {
    "plain": "global_step{}/mp_rank_00_model_states.pt",
    "trainer": "checkpoint-{0}/global_step{0}/mp_rank_00_model_states.pt",
    "accelerate": "step_{}/pytorch_model/mp_rank_00_model_states.pt",
}


def start(command, output, *arguments):
    """Run a command from the repository, its output in a folder of ours; what it said."""
    words = [word.replace(f"runs/{output.parent.name}", str(output)) for word in shlex.split(command)]
    words += ["--output", str(output), *arguments]
    if words[0] == "deepspeed":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words[1:1] = ["--master_port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if words[0] == "deepspeed":  # its launcher leaves 66 MiB a rank in memory
        for left in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_*"):
            os.remove(left)
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


def losses_of(script, output, result):
    """The loss of every step that a run has made."""
    if script != "trainer":
        return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)", result.stdout, re.M)}
    history = json.loads((output / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
    return {record["step"]: record["loss"] for record in history if "loss" in record}


def saved(script, output, step):
    return torch.load(output / STATE[script].format(step), weights_only=False, map_location="cpu")


def check_ours(script, result):
    said = [line for line in result.stderr.splitlines() if line.startswith("SSR ")]
    assert sum("active on" in line for line in said) == 1, said
    assert re.search(rf"^{ROUTER[script]}\b", result.stdout, re.M), result.stdout
    if script != "plain":
        assert sum("leaves the model's own auxiliary loss as it is" in line for line in said) == 1, said
    assert not any("begins with its initial state" in line for line in said), said


def interrupted(script, whole, output):
    """The folder of a run that was killed after step 10."""
    if script == "plain":
        shutil.copytree(whole / "global_step10", output / "global_step10")
        (output / "latest").write_text("global_step10")
    if script == "trainer":
        shutil.copytree(whole / "checkpoint-10", output / "checkpoint-10")
    if script == "accelerate":
        shutil.copytree(whole / "step_10", output / "step_10")


def check_script(script, folder, *arguments):
    first, then = COMMANDS[script]
    whole, resumed = folder / script / "whole", folder / script / "resumed"
    result = start(first, whole, *arguments)
    check_ours(script, result)
    losses = losses_of(script, whole, result)
    assert list(losses) == list(range(1, 21))
    assert sum(losses[step] for step in range(16, 21)) / 5 < losses[1] - 1.5, losses

    interrupted(script, whole, resumed)
    result = start(then, resumed, *arguments)
    check_ours(script, result)
    again = losses_of(script, resumed, result)
    assert [step for step in again if step > 10] == list(range(11, 21))
    assert (1 in again) == (script == "trainer")  # whose history is in its checkpoint
    # Two gloo ranks on one machine add in one order: the resumed run is the same to the bit.
    assert {step: again[step] for step in range(11, 21)} == {step: losses[step] for step in range(11, 21)}
    kept = [saved(script, run, step) for run, step in ((whole, 10), (whole, 20), (resumed, 20))]
    half, end, end_again = [
        [layer["state"]["potentials"] for layer in states[KEY]["layers"].values()] for states in kept
    ]
    assert len(end) == (1 if script == "plain" else 2)
    assert all(potentials.any() for potentials in half)
    assert not any(torch.equal(a, b) for a, b in zip(half, end, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(end_again, end, strict=True))
    for name, weight in kept[1]["module"].items():
        assert torch.equal(weight, kept[2]["module"][name]), name


@pytest.mark.parametrize("script", COMMANDS)
def test_an_entry_point_trains_with_ssr_and_resumes_bit_for_bit(script, tmp_path):
    """Each run is resumed under another launcher than it was begun with."""
    check_script(script, tmp_path)


@pytest.mark.slow
def test_the_trainer_does_so_under_zero_3_too(tmp_path, monkeypatch):
    config = json.loads((ROOT / "tests" / "examples" / "ds.json").read_text())
    config["zero_optimization"]["stage"] = 3
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    monkeypatch.setitem(STATE, "trainer", "checkpoint-{0}/global_step{0}/zero_pp_rank_0_mp_rank_00_model_states.pt")
    check_script("trainer", tmp_path, "--deepspeed", str(tmp_path / "zero3.json"))


def test_the_examples_are_short_and_the_readme_prints_their_commands():
    for script in (ROOT / "tests" / "examples").glob("*.py"):
        assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 60, script.name
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    printed = {" ".join(line.split()) for line in readme.splitlines()}
    assert {command for both in COMMANDS.values() for command in both} <= printed
