"""Every benchmark command still runs; what it measures is its own affair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.inputs import KINDS, logits
from benchmarks.rivals import primal_sinkhorn
from ssr_deepspeed.ot import plan, solve

ROOT = Path(__file__).parents[2]


def run(*command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [[], ["--gates"]])
def test_the_gates_are_timed_side_by_side(options, tmp_path):
    lines = tmp_path / "cells.jsonl"
    sizes = ["--tokens", "64", "--experts", "8", "--k", "2", "--inputs", "clustered", "--repeats", "1"]
    text = run("benchmarks.gate_speed", *sizes, *options, "--json", str(lines))
    (cell,) = map(json.loads, lines.read_text().splitlines())
    assert cell["rules"]["TopKGate"]["ratio"] == 1
    assert {"softmax", "transport"} < set(cell["rules"])
    for result in cell["rules"].values():
        assert result["milliseconds"] > 0
        # The logits' gradient at least is made on the way.
        assert result["bytes"] >= 64 * 8 * 4
    assert "geometric mean" in text
    if not options:
        assert cell["rules"]["softmax next"]["dropped"] == 0
        assert cell["rules"]["transport"]["error"] <= 1e-3


def test_the_solvers_are_compared(tmp_path):
    lines = tmp_path / "cells.jsonl"
    sizes = ["--tokens", "64", "--experts", "8", "--entropies", "0.1", "--inputs", "clustered", "--repeats", "1"]
    run("benchmarks.solvers", *sizes, "--json", str(lines))
    (cell,) = map(json.loads, lines.read_text().splitlines())
    assert cell["methods"]["newton"]["converged"]
    trace = run("benchmarks.solvers", *sizes, "--trace", "--methods", "newton")
    assert "newton 1:" in trace


def test_capacity_is_measured_on_two_ranks():
    sizes = ["--tokens", "64", "--width", "16", "--hidden", "16", "--experts", "4", "--layers", "1", "--steps", "2"]
    text = run("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "benchmarks.capacity", *sizes)
    rows = {line[:24].strip(): line[24:].split() for line in text.splitlines() if "%" in line}
    # Of 4 experts x capacity slots x 16 fp32, there and back, forward and backward, 64 tokens top-2.
    assert float(rows["TopKGate 1.25"][2]) == pytest.approx(4 * 4 * 40 * 16 * 4 / 1e6, abs=0.05)
    assert rows["SSR softmax 1.0 next"][3] == "0.00%"


@pytest.mark.slow
def test_the_monitors_own_time_is_measured(tmp_path):
    lines = tmp_path / "hosts.jsonl"
    sizes = ["--hosts", "topk", "qwen3", "--layers", "1", "--steps", "8", "--interval", "4", "--tokens", "128"]
    run("benchmarks.monitor_overhead", *sizes, "--json", str(lines))
    measured = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(one["host"], one["layers"]) for one in measured] == [("topk", 1), ("qwen3", 1)]
    for one in measured:
        assert 0 < one["share"] < 1
        assert one["last"] > one["microseconds"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_megatron_rule_selects_by_the_transport_plan(kind):
    scores = logits(kind, 128, 8)
    experts, weights, _ = primal_sinkhorn(scores, 2, turns=2000)
    dense = plan(scores, solve(scores, 1.0, tolerance=1e-5, max_iterations=1000).potentials, 1.0)
    same = (experts.sort(1).values == dense.topk(2, dim=1).indices.sort(1).values).all(1)
    assert same.float().mean() > 0.97
    torch.testing.assert_close(weights, torch.softmax(scores, 1).gather(1, experts))
