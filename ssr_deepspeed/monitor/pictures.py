"""The page's two main pictures as PNG, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ssr_deepspeed.monitor.figures import run_names
from ssr_deepspeed.monitor.records import RunLog

# Okabe and Ito's colours, told apart under every common colour-vision deficiency.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00") * 8
# More records than a picture has pixels are not worth reading, more lines than these not worth drawing.
_RECORDS, _LINES = 1000, 12


def write_pictures(logs: Sequence[RunLog], folder: Path) -> list[Path]:
    """Write `loss.png`, where a run has training records, and `load.png` into a folder; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    named = list(zip(run_names(logs), logs, strict=True))
    figures = {"load.png": _load_figure(named)}
    if any(log.steps("train") for log in logs):
        figures["loss.png"] = _loss_figure(named)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def _loss_figure(runs: list[tuple[str, RunLog]]) -> Figure:
    """Training loss and held-out loss over steps, in nats a token."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, log), colour in zip(runs, _COLOURS, strict=False):
        for kind, key, style, label in (
            ("train", "loss", "-", "training"),
            ("evaluation", "nats_per_token", "o--", "held out"),
        ):
            records = log.records(kind, _RECORDS)
            steps, values = [r["step"] for r in records], [_or_nan(r[key]) for r in records]
            axes.plot(steps, values, style, color=colour, markerfacecolor="white", label=f"{_plain(name)}: {label}")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats a token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _load_figure(runs: list[tuple[str, RunLog]]) -> Figure:
    """MaxVio over steps, and for each run the load of every expert of every layer in the last window."""
    loads = {name: (step, _loads(log, step)) for name, log in runs for step in log.steps("experts")[-1:]}
    figure = Figure(figsize=(8, 4 + 2.2 * max(len(loads), 1)), layout="constrained")
    top, *maps = figure.subplots(1 + len(loads), 1, height_ratios=[4, *[2.2] * len(loads)], squeeze=False)[:, 0]
    for (name, log), colour in zip(runs, _COLOURS, strict=False):
        records = log.records("load", _RECORDS)
        steps = [record["step"] for record in records]
        for index, (label, values) in enumerate(_curves(records, len(runs))):
            style = ("-", "--", ":", "-.")[index % 4]
            top.plot(steps, values, style, color=colour, label=f"{_plain(name)}, {label}")
    top.set(xlabel="optimizer step", ylabel="MaxVio of a training step", title="Load imbalance (0 is even)")
    top.grid(alpha=0.3)
    if 0 < len(top.lines) <= _LINES:
        top.legend()
    # One scale for all, so that equal colours mean equal loads.
    most = max((float(np.nanmax(load, initial=2.0)) for _, load in loads.values()), default=2.0)
    for axes, (name, (step, load)) in zip(maps, loads.items(), strict=True):
        image = axes.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
        title = f"{_plain(name)}: load of each expert (1 is even), to step {step}"
        axes.set(xlabel="expert", ylabel="layer", title=title)
        if len(load) <= _LINES:
            axes.set_yticks(range(len(load)))
        if load.shape[1] <= 32:
            axes.set_xticks(range(load.shape[1]))
        figure.colorbar(image, ax=axes)
    return figure


def _curves(records: list[dict], runs: int) -> list[tuple[str, list[float]]]:
    """MaxVio of each layer; where these are many, of the model."""
    layers = list(records[-1].get("layers", {})) if records else []
    if len(layers) * runs <= _LINES:
        return [
            (f"layer {index}", [_or_nan(r.get("layers", {}).get(name, {}).get("max_vio")) for r in records])
            for index, name in enumerate(layers)
        ]
    return [
        (label, [_or_nan(r.get("model", {}).get("max_vio", {}).get(key)) for r in records])
        for key, label in (("mean", "mean"), ("worst", "worst layer"))
    ]


def _loads(log: RunLog, step: int) -> np.ndarray:
    """Load of each layer's experts over their mean; NaN where a layer has fewer experts than the widest."""
    rows = log.loads(step) or [[]]
    width = max(len(row) for row in rows)
    return np.array([[_or_nan(share) for share in row] + [math.nan] * (width - len(row)) for row in rows])


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(name: str) -> str:
    """A name as matplotlib shows it, without formulas in it."""
    return name.replace("$", r"\$")
