"""A run's records in its JSON lines: read piece by piece while the run goes on, and in part where they are many.

A file is indexed by the beginning of its lines, `{"kind":"load","step":50,`, and only what somebody asks for is
parsed. A half-written last line is left for later; a damaged one in the middle is left out and counted. Where steps
go back, a run was resumed or begun anew, and what came after that step before is forgotten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

METRICS = "metrics.jsonl"
CONFIG = "config.json"

_BEGINNING = re.compile(rb'\{"kind":\s?"(\w+)",\s?"step":\s?(\d+)[,}]')
# Written once a step or window at most: one that is not later than the last of its kind says that the run went back.
_ONCE = ("train", "load")


@dataclass(frozen=True)
class _Line:
    kind: str
    step: int
    offset: int
    length: int


class RunLog:
    """The records of one run.

    Args:
        path: a run's folder, with `metrics.jsonl` in it, or a JSON lines file of another name.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.file = path / METRICS if path.is_dir() else path
        if not self.file.is_file():
            raise ValueError(f"{path} holds no run: there is no {self.file}")
        self.name = (path if path.is_dir() else path.with_suffix("")).resolve().name
        self._damaged: set[int] = set()
        self._lines: list[_Line] = []
        self._last: dict[str, int] = {}
        self._read_to = 0
        self._inode = 0
        self.refresh()

    @property
    def config(self) -> Record:
        """The run's resolved configuration; empty where it has none, or none that can be read, beside its records."""
        try:
            found = json.loads((self.file.parent / CONFIG).read_text(encoding="utf-8"), parse_constant=lambda _: None)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def damaged(self) -> int:
        """Lines found so far that are no record."""
        return len(self._damaged)

    def refresh(self) -> bool:
        """Read what was appended since; whether there was anything. A file that was cut or replaced is read anew."""
        now = self.file.stat()
        if now.st_size < self._read_to or now.st_ino != self._inode:
            self._inode = now.st_ino
            self._lines, self._last, self._read_to, self._damaged = [], {}, 0, set()
        before = self._read_to
        with self.file.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._index(line, self._read_to)
                self._read_to += len(line)
        return self._read_to > before

    def steps(self, kind: str) -> list[int]:
        """The steps that have a record of that kind."""
        return [line.step for line in self._lines if line.kind == kind]

    def records(self, kind: str, most: int | None = None, steps: Collection[int] | None = None) -> list[Record]:
        """The records of that kind in the order of their steps.

        Args:
            kind: of the records.
            most: at most so many, evenly chosen, the last among them.
            steps: only those of these steps.
        """
        lines = [line for line in self._lines if line.kind == kind and (steps is None or line.step in steps)]
        if most is not None and len(lines) > most:
            lines = [lines[len(lines) - 1 - (len(lines) - 1) * i // max(most - 1, 1)] for i in reversed(range(most))]
        return self._parse(lines)

    def loads(self, step: int) -> list[list[float | None]] | None:
        """Load over the mean of every layer's experts in the window that ended at that step."""
        for record in self.records("experts", steps={step}):
            return record["load_over_mean"]
        return None

    def raised(self) -> list[Record]:
        """The alerts that are not over."""
        found: dict[tuple[Any, ...], Record] = {}
        for alert in self.records("alert"):
            key = (alert["alert"], alert["layer"], alert["expert"])
            found.pop(key, None)
            if alert["state"] == "raised":
                found[key] = alert
        return list(found.values())

    def _index(self, line: bytes, offset: int) -> None:
        found = _BEGINNING.match(line)
        if found is None or not line.rstrip().endswith(b"}"):
            if line.strip():
                self._damaged.add(offset)
            return
        kind, step = found[1].decode(), int(found[2])
        if kind in _ONCE:
            if step <= self._last.get(kind, -1):
                self._lines = [one for one in self._lines if one.step < step]
                self._last = {other: min(last, step - 1) for other, last in self._last.items()}
            self._last[kind] = step
        self._lines.append(_Line(kind, step, offset, len(line)))

    def _parse(self, lines: list[_Line]) -> list[Record]:
        records = []
        with self.file.open("rb") as file:
            for line in lines:
                file.seek(line.offset)
                try:
                    records.append(json.loads(file.read(line.length), parse_constant=lambda _: None))
                except ValueError:  # damaged between its ends
                    self._damaged.add(line.offset)
        return records
