"""Whether a quick study says the same as the full one.

    python -m benchmarks.study.agreement quick.jsonl full.jsonl

For every two arms that both have on the same data: where their difference, paired over seeds, exceeds
two standard errors in both studies, its sign must be the same. Exits with 1 where it is not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.records import Difference, Run, groups, headline, label, paired, read_runs

# The words in which a setting names its data; all else of it may differ between quick and full.
_DATA = ("corpus", "data")


@dataclass(frozen=True)
class Verdict:
    """Two arms compared by one metric in both studies."""

    data: str
    metric: str
    arms: tuple[str, str]
    quick: Difference
    full: Difference
    """The first arm less the second."""

    @property
    def says(self) -> str:
        """`"agree"`, `"contradict"`, or `"open"` where one of the differences may be chance."""
        if not (self.quick.significant and self.full.significant):
            return "open"
        return "agree" if self.quick.mean * self.full.mean > 0 else "contradict"


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quick", type=Path, help="JSON-lines file of the quick study")
    parser.add_argument("full", type=Path, help="JSON-lines file of the full study")
    parser.add_argument("--quick-table", default="quick", help="table of the quick study")
    parser.add_argument("--full-table", default="main", help="table of the full study")
    options = parser.parse_args(arguments)
    try:
        quick, full = (
            [run for run in read_runs(file) if run.table == table]
            for file, table in ((options.quick, options.quick_table), (options.full, options.full_table))
        )
        verdicts = list(compare(quick, full))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"agreement: {error}")
    print("\n".join(_table(verdicts)))
    said = [verdict.says for verdict in verdicts]
    print(f"\n{said.count('agree')} agree, {said.count('contradict')} contradict, {said.count('open')} open")
    if "contradict" in said:
        sys.exit(1)


def compare(quick: Sequence[Run], full: Sequence[Run]) -> Iterator[Verdict]:
    """The verdict on every two arms, for the headline metric and MaxVio of a training batch.

    Raises:
        ValueError: the studies share no two arms on the same data, or one has two settings of it.
    """
    ours, theirs = _by_data(quick), _by_data(full)
    pairs = [
        (data, pair)
        for data in ours
        if data in theirs
        for pair in itertools.combinations([arm for arm in ours[data] if arm in theirs[data]], 2)
    ]
    if not pairs:
        raise ValueError(f"no two arms on the same data in both: quick has {list(ours)}, full has {list(theirs)}")
    for data, (first, second) in pairs:
        for metric in (headline(quick), "max_vio_batch"):
            short, long = (paired(study[data][first], study[data][second], metric) for study in (ours, theirs))
            yield Verdict(data, metric, (first, second), short, long)


def _by_data(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    found: dict[str, dict[str, list[Run]]] = {}
    for (table, setting), arms in groups(runs).items():
        job = json.loads(setting)
        data = next((job[key] for key in _DATA if key in job), "")
        name = " + ".join(data) if isinstance(data, list) else str(data)
        if name in found:
            raise ValueError(f"table {table!r} has two settings on {name!r}: compare tables with one")
        found[name] = arms
    return found


def _table(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "| data | metric | difference | quick | full | verdict |"
    yield "|---|---|---|---|---|---|"
    for verdict in verdicts:
        first, second = map(label, verdict.arms)
        cells = (f"{found.mean:+.4f} ± {found.error:.4f}" for found in (verdict.quick, verdict.full))
        yield f"| {verdict.data} | {verdict.metric} | {first} less {second} | {' | '.join(cells)} | {verdict.says} |"


if __name__ == "__main__":
    main()
