"""Where reports go: JSON lines, and the engine's own monitor (TensorBoard, W&B, CSV, Comet)."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from ssr_deepspeed.files import replace_text

# What scalar sinks get, as `Train/SSR/<layer>/<metric>`; the JSON lines hold everything.
_SCALARS = ("max_vio", "max_vio_window", "min_vio", "drop_rate", "dead_share", "straggler", "transport_share")
# Of the model, as `Train/SSR/<metric>_mean` and `_worst`.
_MODEL_SCALARS = ("max_vio", "drop_rate", "dead_share", "straggler", "router_entropy", "rerouted")
# With more layers than this, those of the first, the last and evenly between them.
_MOST_LAYERS = 16
# Records that wait for a full disk to have room.
_MOST_WAITING = 1000


class JsonLines:
    """Appends one JSON object a line, each at once, so that a killed process loses no record.

    Where the disk is full no half line stays, which another writer would go on from, and the records wait for the next
    that finds room. A last line that an earlier writer left half-written is removed first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole = self.path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(self.path, end)
        self._waiting: list[str] = []
        self._file = self._opened()

    def _opened(self) -> io.FileIO:
        return self.path.open("ab", buffering=0)

    def _reopen(self) -> None:
        self._file, old = self._opened(), self._file
        old.close()

    def write(self, *records: dict[str, Any]) -> None:
        """Append records, after those that wait.

        Raises:
            OSError: not all found room. What did not waits; of very many the oldest are dropped.
        """
        self._waiting = [*self._waiting, *map(_line, records)][-_MOST_WAITING:]
        try:
            moved = os.fstat(self._file.fileno()).st_ino != self.path.stat().st_ino
        except FileNotFoundError:
            moved = True
        if moved:  # another writer has rewritten the file
            self._reopen()
        while self._waiting:
            self._append(self._waiting[0].encode())
            del self._waiting[0]

    def _append(self, line: bytes) -> None:
        """Append a whole line or nothing."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            while written < len(line):  # a disk may take what it has room for, and refuse the rest
                written += self._file.write(line[written:])
        except OSError:
            os.truncate(self._file.fileno(), end)
            raise

    def forget_after(self, step: int, kinds: Collection[str]) -> None:
        """Drop the records of these kinds and later steps: a run that resumes at `step` writes them again."""

        def stays(line: str) -> bool:
            return not any(_is_after(step, record) for record in _of_kinds(line, kinds))

        self._waiting = list(filter(stays, self._waiting))
        if not any(_is_after(step, record) for record in read_kinds(self.path, kinds)):
            return
        with self.path.open(encoding="utf-8") as file:
            kept = list(filter(stays, file))
        replace_text(self.path, "".join(kept))
        self._reopen()

    def close(self) -> None:
        """Close the file, when what waits has been tried once more."""
        with contextlib.suppress(OSError):
            self.write()
        self._file.close()


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a killed writer left half-written is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return records


def read_kinds(path: str | Path, kinds: Collection[str]) -> Iterator[dict[str, Any]]:
    """The records of these kinds; lines of others are not parsed, which for long ones takes most of the time."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield from _of_kinds(line, kinds)


def _of_kinds(line: str, kinds: Collection[str]) -> list[dict[str, Any]]:
    """The record of a line if it is of these kinds. A damaged one is none: the readers count it."""
    marks = tuple(f'{{"kind":{space}"{kind}"' for kind in kinds for space in ("", " "))
    try:
        return [json.loads(line)] if line.startswith(marks) and line.endswith("}\n") else []
    except ValueError:
        return []


def _is_after(step: int, record: dict[str, Any]) -> bool:
    """Whether a run that resumes at `step` has not written the record yet. What stops a run bears the step before."""
    stops = record["kind"] == "alert" and record["value"] is None
    return record["step"] > step - stops


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the records that are not wanted, in one step; nothing happens where there is no file.

    Lines that a killed writer or a full disk left half-written go too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            if wanted(json.loads(line)):
                kept.append(line)
    replace_text(path, "".join(kept))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"


def load_records(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A load report as the records that are written: the figures, and in a line of their own every expert's load.

    Of many experts that line is long, and a reader may leave most of them unread. Loads are over the mean.
    """
    layers = {
        name: {key: value for key, value in figures.items() if key != "load"}
        for name, figures in report["layers"].items()
    }
    loads = [
        [None if share is None else round(share * len(figures["load"]), 3) for share in figures["load"]]
        for figures in report["layers"].values()
    ]
    return [{**report, "layers": layers}, {"kind": "experts", "step": report["step"], "load_over_mean": loads}]


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """A load report as few numbers by name: of the model, and of 16 layers at most."""
    names = list(report["layers"])
    if len(names) > _MOST_LAYERS:
        names = [names[round(i * (len(names) - 1) / (_MOST_LAYERS - 1))] for i in range(_MOST_LAYERS)]
    found = {f"{name}/{metric}": report["layers"][name][metric] for name in names for metric in _SCALARS}
    for metric in _MODEL_SCALARS:
        of_model = report["model"].get(metric, {})
        found |= {f"{metric}_{which}": of_model.get(which) for which in ("mean", "worst")}
    return {name: value for name, value in found.items() if value is not None}


def engine_events(report: dict[str, Any], samples: int) -> list[tuple[str, float, int]]:
    """A report as the events of DeepSpeed's `MonitorMaster.write_events`."""
    return [(f"Train/SSR/{name}", value, samples) for name, value in scalars(report).items()]
