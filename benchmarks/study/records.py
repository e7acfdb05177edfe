"""The study's records as numbers: one a run and metric, compared by seed.

A record is `{"job": {"table", "arm", "seed", ...}, "result": {metric: number, list or object}}`.
What else the job holds is the setting, apart from what belongs to the arm.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.arms import ARMS
from ssr_deepspeed.monitor.sinks import read_json_lines

HEADLINES = ("bits_per_byte", "accuracy")
"""What a run is judged by: the first that its result has."""

# The run itself, and how its arm is configured.
_NOT_SETTING = ("table", "arm", "seed", "ssr", "auxiliary_loss")


@dataclass(frozen=True)
class Run:
    """One record."""

    table: str
    setting: str
    """The rest of the job as JSON: equal for runs that can be compared."""
    arm: str
    seed: int
    result: dict[str, Any]

    def value(self, *path: str) -> float:
        """A metric; for a list or an object the mean of what is in it. NaN where there is none.

        Args:
            path: the metric's name, and keys into its object.
        """
        found: Any = self.result
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        leaves = _leaves(found)
        return statistics.fmean(leaves) if leaves else math.nan


@dataclass(frozen=True)
class Difference:
    """Of a metric between two arms, over the seeds that both have."""

    mean: float
    error: float
    """Standard error of the mean; NaN for one seed."""
    seeds: int

    @property
    def significant(self) -> bool:
        """Whether it exceeds two standard errors."""
        return self.seeds > 1 and abs(self.mean) > 2 * self.error


def read_runs(path: Path) -> list[Run]:
    """The records of a file; of two runs alike but for their arm's configuration, the later one.

    Raises:
        ValueError: a record is not of the shape above.
    """
    runs = {}
    for number, record in enumerate(read_json_lines(path), 1):
        try:
            job, result = record["job"], record["result"]
            setting = json.dumps({key: job[key] for key in sorted(job) if key not in _NOT_SETTING}, sort_keys=True)
            run = Run(job["table"], setting, job["arm"], job["seed"], result)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no record of a run: {error!r} is missing or wrong") from None
        runs[run.table, run.setting, run.arm, run.seed] = run
    return list(runs.values())


def headline(runs: Sequence[Run]) -> str:
    """The metric that these runs are judged by."""
    for name in HEADLINES:
        if any(name in run.result for run in runs):
            return name
    raise ValueError(f"no run has one of the metrics {HEADLINES}: all of them diverged")


def groups(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, list[Run]]]:
    """Runs by table and setting, then by arm, in the order of the file."""
    found: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault((run.table, run.setting), {}).setdefault(run.arm, []).append(run)
    return found


def paired(runs: Sequence[Run], reference: Sequence[Run], *path: str) -> Difference:
    """A metric of some runs less that of the reference, seed by seed.

    Runs of one seed share weights and order of the data, so much of the noise is in both.
    """
    theirs = {run.seed: run.value(*path) for run in reference}
    values = [run.value(*path) - theirs[run.seed] for run in runs if run.seed in theirs]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return Difference(math.nan, math.nan, 0)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(statistics.fmean(values), error, len(values))


def label(arm: str) -> str:
    """An arm as tables and plots name it."""
    return ARMS[arm].label if arm in ARMS else arm


def _leaves(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None else [float(value)]
