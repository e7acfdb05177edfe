"""`ssr-monitor report`: what runs have recorded as one HTML page that needs no network, and as PNG.

It reads a run's `metrics.jsonl` (or whatever file `ssr.monitor.path` names) and nothing else, so it can be written
again at any time, also of a run that goes on or was killed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ssr_deepspeed.files import replace_text
from ssr_deepspeed.monitor.figures import page_data
from ssr_deepspeed.monitor.page import page
from ssr_deepspeed.monitor.records import RunLog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run or its JSON lines file; several: compared")
    parser.add_argument("-o", "--output", type=Path, help="the page; default: report.html by the first run's records")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also loss.png and load.png; needs matplotlib")


def main(arguments: argparse.Namespace) -> int:
    logs = [RunLog(path) for path in arguments.run]
    print(write_page(logs, arguments.output or logs[0].file.with_name("report.html")))
    if arguments.png:
        for file in _write_pictures(logs, arguments.png):
            print(file)
    return 0


def write_page(logs: Sequence[RunLog], file: Path) -> Path:
    """Write the page of some runs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, page(page_data(logs)))
    return file


def write_report(folder: Path, compare: Sequence[Path] = ()) -> Path:
    """Write `report.html`, `loss.png` and `load.png` into a run's folder.

    Args:
        folder: the run.
        compare: folders of other runs to show beside it.
    """
    logs = [RunLog(path) for path in (folder, *compare)]
    _write_pictures(logs, folder)
    return write_page(logs, folder / "report.html")


def _write_pictures(logs: Sequence[RunLog], folder: Path) -> list[Path]:
    # Imported here: the page alone needs no matplotlib.
    try:
        from ssr_deepspeed.monitor.pictures import write_pictures
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need matplotlib (pip install matplotlib): {error}") from None
    return write_pictures(logs, folder)
