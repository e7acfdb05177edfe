"""Plots of a study's results, as PNG beside its JSON-lines file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.records import Run, groups, headline, label

Arms = dict[str, list[Run]]

_TITLES = {"bits_per_byte": "held-out bits per byte", "accuracy": "test accuracy"}


def write_plots(runs: Sequence[Run], results: Path) -> list[Path]:
    """Draw every table and setting of a results file; the files written.

    For each: the headline metric over training time, the same against MaxVio, and, where words were
    swapped, bits per byte over their share. Runs that diverged are not drawn.
    """
    drawn = [run for run in runs if not run.result.get("diverged")]
    written, numbers = [], dict[str, int]()
    for (table, _), arms in groups(drawn).items():
        numbers[table] = numbers.get(table, 0) + 1
        for name, draw in _PLOTS.items():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            axes = figure.subplots()
            if not draw(axes, arms, headline(drawn)):
                continue
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
            written.append(results.with_name(f"{results.stem}_{table}_{numbers[table]}_{name}.png"))
            figure.savefig(written[-1], dpi=120)
    return written


def over_time(axes: Axes, arms: Arms, metric: str) -> bool:
    """Mean curve of each arm over its mean training seconds, without evaluation."""
    curves = {arm: [run.result["curve"] for run in runs if run.result.get("curve")] for arm, runs in arms.items()}
    for (arm, found), colour in zip(curves.items(), _colours(arms), strict=True):
        points = min(map(len, found), default=0)
        if points:
            mean = numpy.mean([[point[1:3] for point in curve[:points]] for curve in found], axis=0)
            axes.plot(mean[:, 0], mean[:, 1], "o-", markersize=3, color=colour, label=label(arm))
    axes.set(xlabel="training seconds", ylabel=f"{_TITLES[metric]} on a part")
    return any(curves.values())


def against_balance(axes: Axes, arms: Arms, metric: str) -> bool:
    """Every run as a point, every arm's mean as a large one."""
    drawn = False
    for (arm, runs), colour in zip(arms.items(), _colours(arms), strict=True):
        points = numpy.array([(run.value("max_vio_batch"), run.value(metric)) for run in runs])
        points = points[numpy.isfinite(points).all(axis=1)]
        if len(points):
            axes.scatter(*points.T, s=12, alpha=0.5, color=colour)
            axes.scatter(*points.mean(axis=0), s=60, color=colour, edgecolor="black", label=label(arm))
            drawn = True
    axes.set(xlabel="MaxVio of a training batch, mean over layers", ylabel=_TITLES[metric])
    return drawn


def over_swapped_words(axes: Axes, arms: Arms, metric: str) -> bool:
    """Bits per byte of the words left, over the share of words swapped."""
    swapped = {arm: [run.result["swapped"] for run in runs if "swapped" in run.result] for arm, runs in arms.items()}
    for (arm, found), colour in zip(swapped.items(), _colours(arms), strict=True):
        if found:
            shares = sorted(found[0], key=float)
            values = [statistics.fmean(one[share] for one in found) for share in shares]
            axes.plot([float(share) for share in shares], values, "o-", color=colour, label=label(arm))
    axes.set(xlabel="words swapped (%)", ylabel="bits per byte of the others")
    return any(swapped.values())


_PLOTS: dict[str, Callable[[Axes, Arms, str], bool]] = {
    "time": over_time,
    "balance": against_balance,
    "swapped": over_swapped_words,
}


def _colours(arms: Arms) -> list[tuple[float, ...]]:
    return [colormaps["tab20"](index % 20) for index in range(len(arms))]
