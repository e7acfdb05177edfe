import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(*arguments):
    environment = {**os.environ, "RANKS": "2"}
    command = [str(ROOT / "launch" / "pretrain.sh"), "--no-preflight", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_launch_script_trains_on_two_ranks_to_a_report(cache, tmp_path):
    """The shipped run file, but for its length and text: progress on rank 0 alone, every file written."""
    sizes = ["--set", "steps=4", "--set", "log_every=2", "--set", "eval_every=2", "--set", "checkpoint_every=0"]
    text = ["--set", f"data.source={cache}/speeches", "--set", f"data.cache={cache}", "--set", "data.heldout=0.1"]
    result = launch("--config", "tiny_cpu", "--output", str(tmp_path / "run"), *sizes, *text)
    assert result.returncode == 0, result.stderr
    steps = [line for line in result.stdout.splitlines() if line.startswith("step 4/4")]
    assert len(steps) == 1
    for word in ("loss", "lr", "tok/s", "imbalance", "ETA"):
        assert word in steps[0]
    assert result.stderr.count("SSR active on 2 routers") == 1
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {".lock", "config.json", "metrics.jsonl", "checkpoints", "report.html", "loss.png", "load.png"}
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["model"]["experts"] == 8
    assert re.fullmatch(r"[0-9a-f]{16}", settings["data"]["fingerprint"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nothing", "--output", "x"], "there is no configuration file 'nothing'"),
        (["--config", "tiny_cpu", "--output", "x", "--set", "deepspeed.ssr.entopy=1"], "did you mean 'entropy'"),
        (["--config", "tiny_cpu"], "--output"),
    ],
)
def test_a_wrong_command_line_ends_with_one_sentence(arguments, words, tmp_path):
    command = [sys.executable, "-m", "ssr_deepspeed.pretrain", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert words in result.stderr
    assert "Traceback" not in result.stderr
