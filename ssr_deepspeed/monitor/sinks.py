"""Where reports go: JSON lines, and the engine's own monitor (TensorBoard, W&B, CSV, Comet)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssr_deepspeed.files import replace_text

# Per layer, what the engine's scalar monitors get; the JSON lines hold everything.
_SCALARS = ("max_vio", "drop_rate", "dead_share", "transport_share")


class JsonLines:
    """Appends one JSON object a line and flushes each, so that a killed process loses no record.

    A last line that an earlier writer left half-written is removed first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole = self.path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(self.path, end)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
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


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the records that are not wanted, in one step; nothing happens where there is no file."""
    if not path.exists():
        return
    kept = filter(wanted, read_json_lines(path))
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def engine_events(layers: dict[str, dict[str, Any]], samples: int) -> list[tuple[str, float, int]]:
    """A report as the events of DeepSpeed's `MonitorMaster.write_events`."""
    return [
        (f"Train/SSR/{name}/{metric}", figures[metric], samples)
        for name, figures in layers.items()
        for metric in _SCALARS
        if figures[metric] is not None
    ]
