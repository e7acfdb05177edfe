"""Watch the expert load of runs in a terminal, while they go on or afterwards.

Every run has a line of its own, its alerts, and for each layer MaxVio over the windows, the figures of the last
window and the load of its experts in it. Where not all fits, the worst layers come first. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ssr_deepspeed.monitor.records import CONFIG, METRICS, RunLog

# No screen is wider, and no more windows are read than it shows.
_MOST_WINDOWS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ssr-monitor watch`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or a JSON lines file")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--interval", type=_seconds, default=2.0, help="seconds between two frames (default 2)")


def main(arguments: argparse.Namespace) -> int:
    """Show the runs until Ctrl-C. 0, or 2 where a path holds no run or rich is missing."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        print("ssr-monitor watch needs rich: pip install 'ssr_deepspeed[monitor]'", file=sys.stderr)
        return 2
    try:
        runs = [Watched(path) for path in arguments.runs]
    except ValueError as error:
        print(f"ssr-monitor watch: {error}", file=sys.stderr)
        return 2
    console = Console()

    def size() -> tuple[int, int | None]:
        # A file has no height.
        return console.width, console.height if console.is_terminal else None

    shown = frames(runs, size, time.time, console.encoding.startswith("utf"))
    try:
        if arguments.once or not console.is_terminal:
            console.print(next(shown))
            return 0
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for frame in shown:
                live.update(frame, refresh=True)
                time.sleep(arguments.interval)
    except KeyboardInterrupt:
        pass
    return 0


def frames(
    runs: list[Watched], size: Callable[[], tuple[int, int | None]], clock: Callable[[], float], blocks: bool = True
) -> Iterator:
    """Frame after frame, each of what the runs have written by then.

    Args:
        runs: in the order in which they are shown.
        size: columns and lines of the screen, asked for at every frame; None lines: as many as it takes.
        clock: seconds since 1970.
        blocks: whether the screen knows block characters.
    """
    from ssr_deepspeed.monitor.view import draw

    while True:
        for run in runs:
            run.refresh()
        yield draw(runs, *size(), clock(), blocks)


class Watched:
    """What is shown of a run, read again when something was appended.

    Raises:
        ValueError: the path is neither a run nor the folder of one that is about to write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.log = path, None
        self.name = (path if path.is_dir() else path.with_suffix("")).resolve().name
        self.step, self.steps, self.damaged = 0, None, 0
        self.training: dict = {}
        """The last record of training."""
        self.windows: list[dict] = []
        self.loads: list[list[float | None]] | None = None
        self.alerts: list[dict] = []
        if not self._is_there() and not (path / CONFIG).is_file():
            raise ValueError(f"{path} holds no run: there is neither {METRICS} nor {CONFIG} in it")

    log: RunLog | None
    steps: int | None

    def refresh(self) -> None:
        """Read what was appended since."""
        if self.log is None and self._is_there():
            self.log = RunLog(self.path)
        elif self.log is None or not self._is_there() or not self.log.refresh():
            return
        log = self.log
        self.windows = log.records("load", most=_MOST_WINDOWS)
        self.loads = log.loads(self.windows[-1]["step"]) if self.windows else None
        self.alerts = log.raised()
        train = log.steps("train")
        last = log.records("train", most=1) if train else []
        self.training = last[-1] if last else {}
        self.step = max([*train[-1:], *(window["step"] for window in self.windows[-1:])], default=0)
        self.steps, self.damaged = _planned(log), log.damaged

    def age(self, now: float) -> float | None:
        """Seconds since something was written; None where nothing was. A clock that went back makes none negative."""
        if self.log is None or not self._is_there() or not self.log.file.stat().st_size:
            return None
        written = self.windows[-1].get("time") if self.windows else None
        if written is None or self.log.steps("train")[-1:] > [self.windows[-1]["step"]]:
            written = self.log.file.stat().st_mtime
        return max(0.0, now - written)

    def _is_there(self) -> bool:
        return (self.path / METRICS if self.path.is_dir() else self.path).is_file()


def _planned(log: RunLog) -> int | None:
    """Steps that the run's configuration asks for, if it says so."""
    try:
        steps = log.config.get("steps")
    except ValueError:  # half-written
        return None
    return steps if isinstance(steps, int) else None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} seconds; allowed: 0.1 to 3600")
    return seconds
