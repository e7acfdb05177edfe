"""Markdown tables and plots of a study's results.

    python -m benchmarks.study.tables --results benchmarks/results

Reads every JSON-lines file of the folder, prints mean and sample standard deviation over seeds and
the differences to a reference arm, paired by seed, and writes the plots beside the file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.plots import write_plots
from benchmarks.study.records import Run, groups, label, paired, read_runs


@dataclass(frozen=True)
class Column:
    """A metric as tables show it; one that no run has is left out."""

    title: str
    path: tuple[str, ...]
    digits: int = 2
    unit: float = 1.0
    """Shown is the value over this: 0.01 for percent."""


COLUMNS = (
    Column("bits per byte", ("bits_per_byte",), 4),
    Column("at 10 % swapped words", ("swapped", "10"), 4),
    Column("accuracy (%)", ("accuracy",), 2, 0.01),
    Column("accuracy, corrupted (%)", ("corrupted",), 2, 0.01),
    Column("MaxVio of a batch", ("max_vio_batch",)),
    Column("MaxVio, held out", ("max_vio_global",)),
    Column("dead experts a layer", ("dead_experts",)),
    Column("dropped (%)", ("trained_drop_rate",), 2, 0.01),
    Column("at capacity 1.0 (%)", ("drop_rate", "1.0"), 2, 0.01),
    Column("at capacity 1.25 (%)", ("drop_rate", "1.25"), 2, 0.01),
    Column("source in expert (bits)", ("mutual_information",), 3),
    Column("gate's share of time (%)", ("gate_time_share",), 1, 0.01),
)
BALANCE = Column("MaxVio of a batch", ("max_vio_batch",))


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of JSON-lines files")
    parser.add_argument("--reference", default="none", help="arm that the others are compared with")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.jsonl"))
    if not files:
        sys.exit(f"tables: {options.results} holds no .jsonl file: run a study with --results in that folder")
    for file in files:
        try:
            runs = read_runs(file)
        except ValueError as error:
            sys.exit(f"tables: {error}")
        for (table, setting), arms in groups(runs).items():
            print("\n".join(section(table, setting, arms, options.reference)), flush=True)
        for plot in write_plots(runs, file):
            print(f"plot: {plot}")


def section(table: str, setting: str, arms: dict[str, list[Run]], reference: str) -> Iterator[str]:
    """The Markdown of one table in one setting."""
    yield f"\n## {table}: {_described(setting)}\n"
    yield from averages(arms)
    if reference not in arms:
        yield f"\nNo run of the reference arm `{reference}` here.\n"
        return
    yield f"\nLess {label(reference)}, paired by seed, with the standard error of the mean:\n"
    yield from differences(arms, reference)
    yield ""


def averages(arms: dict[str, list[Run]]) -> Iterator[str]:
    """Mean ± sample standard deviation over seeds."""
    shown = [column for column in COLUMNS if _any(arms, column)]
    yield from _head("arm", "seeds", *(column.title for column in shown))
    for arm, runs in arms.items():
        diverged = sum(bool(run.result.get("diverged")) for run in runs)
        seeds = f"{len(runs)}, {diverged} diverged" if diverged else f"{len(runs)}"
        yield row(label(arm), seeds, *(_mean_and_deviation(runs, column) for column in shown))


def differences(arms: dict[str, list[Run]], reference: str) -> Iterator[str]:
    """Paired difference ± standard error of the headline, the swapped or corrupted text, and MaxVio."""
    shown = [column for column in (*COLUMNS[:4], BALANCE) if _any(arms, column)]
    yield from _head("arm", "seeds", *(column.title for column in shown))
    for arm, runs in arms.items():
        if arm == reference:
            continue
        found = [(column, paired(runs, arms[reference], *column.path)) for column in shown]
        cells = [_plus_minus(f.mean, f.error, c, "+") for c, f in found]
        yield row(label(arm), str(found[0][1].seeds) if found else "0", *cells)


def _mean_and_deviation(runs: list[Run], column: Column) -> str:
    values = [value for value in (run.value(*column.path) for run in runs) if math.isfinite(value)]
    mean = statistics.fmean(values) if values else math.nan
    return _plus_minus(mean, statistics.stdev(values) if len(values) > 1 else math.nan, column)


def _plus_minus(mean: float, spread: float, column: Column, sign: str = "") -> str:
    if math.isnan(mean):
        return "-"
    text = f"{mean / column.unit:{sign}.{column.digits}f}"
    return text if math.isnan(spread) else f"{text} ± {spread / column.unit:.{column.digits}f}"


def _any(arms: dict[str, list[Run]], column: Column) -> bool:
    return any(math.isfinite(run.value(*column.path)) for runs in arms.values() for run in runs)


def _described(setting: str) -> str:
    """A setting in words: the data, then the model, then the rest."""
    parts = []
    for name, value in json.loads(setting).items():
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        parts += [f"{key.replace('_', ' ')} {_plain(item)}" for key, item in inner]
    return ", ".join(parts)


def _plain(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def _head(*titles: str) -> Iterable[str]:
    return row(*titles), "|" + "---|" * len(titles)


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
