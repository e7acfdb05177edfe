"""Small runs of launch/pretrain.sh, and what became of them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "pretrain.sh"
RUN = ["--config", "tiny_cpu", "--output", "runs/a b", "--set", "steps=4"]
"""A run's own arguments, for a script that starts no ranks."""
SIZES = ["width=32", "heads=2", "experts=4", "expert_width=32"]


def environment(**variables):
    """This one without what a scheduler, a launcher or the user sets."""
    ours = ("PET_", "SLURM_", "TORCHELASTIC_", "MASTER_", "RDZV_", "GLOO_", "SSR_", "HOSTNAME")
    names = ("NNODES", "NODE_RANK", "RANKS", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours) and key not in names}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": paths, **variables}


def heed_signals():
    """In a new process: one that was started in the background, or by nohup, may have been told to ignore them."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def arguments(cache, output, steps, *settings):
    """A small run with every step's loss recorded and a checkpoint every 20."""
    pairs = [f"model.{size}" for size in SIZES]
    pairs += [f"data.source={cache}/speeches", f"data.cache={cache}", "data.heldout=0.1", "data.sequence_length=64"]
    pairs += ["deepspeed.train_micro_batch_size_per_gpu=4", "log_every=1", "eval_every=0", "checkpoint_every=20"]
    pairs += [f"steps={steps}", *settings]
    return ["--config", "tiny_cpu", "--output", output, *(word for pair in pairs for word in ("--set", pair))]


def alone(*words):
    command = [SCRIPT, "--ranks-per-node", "2", "--no-preflight", *words]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]


def finish(processes, logs, seconds=600):
    for process in processes:
        process.wait(timeout=seconds)
    said = "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
    assert [process.returncode for process in processes] == [0] * len(processes), said


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def latest(run):
    file = run / "checkpoints" / "latest"
    return int(file.read_text().removeprefix("step_")) if file.exists() else 0


def wait_for(condition, seconds, what):
    """Poll until a condition holds; what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.1)
    return found
