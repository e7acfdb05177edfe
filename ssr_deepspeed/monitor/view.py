"""Runs as lines of a terminal: `ssr-monitor watch` draws them anew at every frame.

Names come from models and folders and are shown as they are: nothing in them is markup, and control characters are
written out. Colours are Okabe and Ito's and say nothing that the characters do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ssr_deepspeed.monitor.alerts import sentence
from ssr_deepspeed.monitor.names import DEAD_BELOW

if TYPE_CHECKING:
    from ssr_deepspeed.monitor.watch import Watched

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
LOW, HIGH = "#0072B2", "#D55E00"
# Of a layer's last window: heading, width, and how a figure is written.
_FIGURES = (
    ("max_vio", "MaxVio", 7, lambda value: f"{value:.3f}"),
    ("drop_rate", "drop", 6, lambda value: f"{100 * value:.1f}%"),
    ("dead_share", "dead", 6, lambda value: f"{100 * value:.0f}%"),
    ("straggler", "strag.", 6, lambda value: f"{value:.2f}"),
    ("transport_share", "transp.", 7, lambda value: f"{100 * value:.0f}%"),
)
_FIGURES_WIDTH = sum(1 + width for _, _, width, _ in _FIGURES)
# Itself, an alert, the headings, the worst layer and how many others there are.
_HEIGHT_OF_RUN = 5
# Less has room for a line about the run and its worst layers, and not for the experts too.
_HEIGHT_OF_EXPERTS = 8


def draw(runs: Sequence[Watched], width: int, height: int | None, now: float, blocks: bool) -> Text:
    """One frame of at most so many columns and lines."""
    lines: list[Text] = []
    shown = len(runs)
    if height is not None and shown * _HEIGHT_OF_RUN > height:
        shown = max(1, (height - 1) // _HEIGHT_OF_RUN)
    for index, run in enumerate(runs[:shown]):
        left = None if height is None else (height - len(lines) - (shown < len(runs))) // (shown - index)
        lines += _run(run, width, left, now, BLOCKS if blocks else ASCII)[:left]
    if shown < len(runs):
        lines.append(Text(f"and {len(runs) - shown} more runs: a higher window shows them", "dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis" if blocks else "crop")
    return Text("\n", no_wrap=True, end="").join(lines[:height])


def literal(text: Any) -> str:
    """A name as it is, control characters written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def distinct(names: Sequence[str]) -> list[str]:
    """Names without the beginning and the end that all share, cut at dots."""
    if len(names) < 2:
        return [literal(name) for name in names]
    parts = [name.split(".") for name in names]
    first = _shared(parts)
    last = _shared([part[first:][::-1] for part in parts])
    kept = [".".join(part[first : len(part) - last]) for part in parts]
    return [literal(short or name) for short, name in zip(kept, names, strict=True)]


def _shared(parts: list[list[str]]) -> int:
    """How many parts all names begin with."""
    return next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), min(map(len, parts)))


def sparkline(values: Iterable[float | None], most: float, ramp: str) -> str:
    """Values from 0 to `most` as characters; a blank where there is none."""
    return "".join(" " if value is None else _level(value / most if most else 0.0, ramp) for value in values)


def heat(loads: Sequence[float | None], cells: int, ramp: str) -> Text:
    """Loads over the mean, in at most so many cells: each shows the expert of its bin that is farthest from it.

    The mean is in the middle of the ramp, twice the mean and more at its end, and `x` is a dead expert.
    """
    cells = max(1, min(cells, len(loads)))
    line = Text()
    for cell in range(cells):
        known = [x for x in loads[cell * len(loads) // cells : (cell + 1) * len(loads) // cells] if x is not None]
        if not known:
            line.append("?")
            continue
        load = max(known, key=lambda value: abs(value - 1))
        style = HIGH if load > 1.25 else LOW if load < 0.75 else ""
        line.append("x" if load < DEAD_BELOW else _level(load / 2, ramp), style)
    return line


def _level(share: float, ramp: str) -> str:
    return ramp[max(0, min(len(ramp) - 1, int(share * len(ramp))))]


def _run(run: Watched, width: int, height: int | None, now: float, ramp: str) -> list[Text]:
    lines = [_header(run, now), *_machine(run)]
    if run.log is None or not run.windows:
        return [*lines, Text("  no load report yet: it comes at the end of the monitor's first window", "dim")]
    most = len(run.alerts) if height is None else max(1, height // 5)
    lines += [Text(f"! {literal(sentence(alert))}", HIGH) for alert in run.alerts[:most]]
    if len(run.alerts) > most:
        lines[-1] = Text(f"! and {len(run.alerts) - most + 1} more alerts", HIGH)
    return lines + _layers(run, width, None if height is None else height - len(lines), ramp)


def _header(run: Watched, now: float) -> Text:
    line = Text(literal(run.name), "bold")
    age = run.age(now)
    if age is None:
        return line.append("  waiting: nothing is written yet", "not bold")
    of = f" of {run.steps}" if run.steps else ""
    line.append(f"  step {run.step}{of}", "not bold")
    speed = run.training.get("tokens_per_second")
    if isinstance(speed, int | float):
        line.append(f"  {speed:,.0f} tokens/s", "not bold")
    line.append(f"  last record {_duration(age)} ago", "not bold")
    if run.damaged:
        line.append(f"  {run.damaged} damaged lines left out", "not bold")
    return line


def _machine(run: Watched) -> list[Text]:
    """Where the time of the last training steps went, if the run says so."""
    shares = {"MFU": "mfu", "waiting for data": "data_wait_share", "in gates": "gate_time_share"}
    found = {name: run.training.get(key) for name, key in shares.items()}
    known = [f"{share:.1%} {name}" for name, share in found.items() if isinstance(share, int | float)]
    return [Text("  " + "  ".join(known), "dim")] if known else []


def _layers(run: Watched, width: int, height: int | None, ramp: str) -> list[Text]:
    """Figures of the worst layers, and below the load of their experts."""
    layers: dict[str, dict[str, Any]] = run.windows[-1]["layers"]
    names = list(layers)
    order = sorted(range(len(names)), key=lambda i: -_or(layers[names[i]].get("max_vio"), -1.0))
    with_experts = run.loads is not None and (height is None or height >= _HEIGHT_OF_EXPERTS)
    shown = len(order)
    if height is not None:
        room = height - 1 - with_experts
        if shown * (1 + with_experts) > room:  # one line says how many are left out
            shown = max(1, (room - 1) // (1 + with_experts))
    order = order[:shown]
    short = distinct(names)
    room = min(max(5, *(cell_len(short[i]) for i in order)), max(8, width // 6))
    lines = _figures(run, names, short, order, room, width, ramp)
    if with_experts and run.loads is not None:
        lines += _experts(run.loads, short, order, room, width, ramp)
    if shown < len(names):
        lines.append(Text(f"and {len(names) - shown} more layers, all more even", "dim"))
    return lines


def _figures(
    run: Watched, names: list[str], short: list[str], order: list[int], room: int, width: int, ramp: str
) -> list[Text]:
    layers = run.windows[-1]["layers"]
    cells = max(0, width - room - 1 - _FIGURES_WIDTH)
    windows = run.windows[-cells:] if cells else []
    series = {i: [window["layers"].get(names[i], {}).get("max_vio") for window in windows] for i in order}
    most = max((value for values in series.values() for value in values if value is not None), default=0.0)
    heading = "".join(f" {title:>{size}}" for _, title, size, _ in _FIGURES)
    lines = [Text(f"{set_cell_size('layer', room)}{heading} MaxVio 0 to {most:.3g}", "dim")]
    for i in order:
        line = Text(set_cell_size(short[i], room))
        for key, _, size, written in _FIGURES:
            value = layers[names[i]].get(key)
            line.append(f" {'-' if value is None else written(value):>{size}}")
        lines.append(line.append(" " + sparkline(series[i], most, ramp), LOW))
    return lines


def _experts(
    loads: list[list[float | None]], short: list[str], order: list[int], room: int, width: int, ramp: str
) -> list[Text]:
    cells = width - room - 1
    widest = max(len(loads[i]) for i in order)
    bins = f", {-(-widest // cells)} a cell, the farthest from the mean" if widest > cells else ""
    legend = f"load of experts: x dead, {ramp[len(ramp) // 2]} mean, {ramp[-1]} twice and more{bins}"
    lines = [Text(legend, "dim")]
    lines += [Text(set_cell_size(short[i], room) + " ").append_text(heat(loads[i], cells, ramp)) for i in order]
    return lines


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
