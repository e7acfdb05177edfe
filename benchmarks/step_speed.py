"""Time of a whole training step under every balancing rule, as a ratio to no balancing.

    python -m benchmarks.step_speed                    # every arm of the study's main table, about six minutes
    python -m benchmarks.step_speed --arms none auxiliary carried --steps 40

All arms train in one process, on the model and text of the study's main table, and take their steps in
turn, A B C A B C ...; a ratio is the median over the turns of that turn's ratio to `none`, so that a machine
whose speed drifts does not matter. One CPU thread. The steps are those after a warm-up in which routers
become what they are in training; where a schedule says otherwise, softmax and transport steps are mixed as
in the study. What tokens cost when routes are dropped is part of it: a collapsed router computes less.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpora import SOURCES, Texts, corpus
from benchmarks.lm_study import SMALL
from benchmarks.study.arms import ARMS, COMPARED
from benchmarks.study.language import StudyRun
from benchmarks.study.tables import row

REFERENCE = "none"
SHAPE = {"model": SMALL, "tokens_per_step": 2048, "sequence_length": 128, "seed": 0}


def main(arguments: list[str] | None = None) -> None:
    """Entry point: measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(COMPARED))
    parser.add_argument("--steps", type=int, default=60, help="timed steps of every arm")
    parser.add_argument("--warmup", type=int, default=40, help="steps before them")
    parser.add_argument("--json", type=Path, help="append every arm's figures to this JSON-lines file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    arms = [REFERENCE, *(arm for arm in options.arms if arm != REFERENCE)]
    seconds = time_steps(arms, options.warmup, options.steps, corpus(SOURCES), SHAPE)
    print("\n".join([row("arm", "step", "ms", "gate's share (%)"), "|---|---|---|---|"]))
    for arm, (steps, gates) in seconds.items():
        ratio = statistics.median(mine / other for mine, other in zip(steps, seconds[REFERENCE][0], strict=True))
        share = sum(gates) / sum(steps)
        print(row(ARMS[arm].label, f"{ratio:.3f}", f"{1e3 * statistics.median(steps):.0f}", f"{100 * share:.1f}"))
        if options.json:
            with options.json.open("a") as lines:
                record = {"arm": arm, "ratio": ratio, "seconds": statistics.median(steps), "gate_time_share": share}
                lines.write(json.dumps(record) + "\n")


def time_steps(
    arms: list[str], warmup: int, steps: int, texts: Texts, shape: dict[str, Any]
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of every timed step, and of the gates' forward passes in it, by arm.

    Args:
        shape: the study's job, but for the arm and its steps.
    """
    runs = {}
    for arm in arms:
        block = ARMS[arm].block_for(warmup + steps)
        job = {**shape, "steps": warmup + steps, "ssr": block, "auxiliary_loss": ARMS[arm].auxiliary_loss}
        runs[arm] = StudyRun(job, texts)
    gates: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(warmup + steps):
        for arm, run in runs.items():
            if not run.step():
                raise SystemExit(f"step_speed: the loss of {arm} is not finite")
            gates[arm].append(run.last[-1].gate_seconds)
    return {arm: (run.step_seconds[warmup:], gates[arm][warmup:]) for arm, run in runs.items()}


if __name__ == "__main__":
    main()
