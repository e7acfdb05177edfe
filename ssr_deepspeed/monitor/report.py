"""The report of a run: one self-contained HTML page, and its two pictures as PNG.

It reads a run's `config.json` and `metrics.jsonl` and nothing else, so it can be written again at
any time, also of a run that was killed. Runs are compared at the last step that both have.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from ssr_deepspeed.monitor.sinks import read_json_lines

Record = dict[str, Any]

# Okabe and Ito's colours, told apart under every common colour-vision deficiency.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class RunRecords:
    """What a run wrote, by kind of record."""

    name: str
    config: dict[str, Any]
    train: list[Record]
    load: list[Record]
    evaluation: list[Record]


def read_run(folder: Path) -> RunRecords:
    """Read a run's folder.

    Raises:
        ValueError: the folder holds no run, or no training record yet.
    """
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no run: there is no {name}")
    records = read_json_lines(folder / "metrics.jsonl")
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "load", "evaluation")}
    if not by_kind["train"]:
        raise ValueError(f"{folder}/metrics.jsonl holds no training record yet")
    return RunRecords(folder.name, json.loads((folder / "config.json").read_text(encoding="utf-8")), **by_kind)


def write_report(folder: Path, compare: Sequence[Path] = ()) -> Path:
    """Write `report.html`, `loss.png` and `load.png` into a run's folder.

    Args:
        folder: the run.
        compare: folders of other runs to show beside it.
    """
    run, others = read_run(folder), [read_run(other) for other in compare]
    pictures = {"loss": _loss_figure([run, *others]), "load": _load_figure([run, *others])}
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    page = _PAGE.substitute(
        title=html.escape(run.name),
        summary=_table(["", run.name], summary(run).items()),
        comparison=_comparison(run, others),
        layers=_layer_table(run),
        config=html.escape(json.dumps(run.config, indent=2)),
        **{name: _svg(figure) for name, figure in pictures.items()},
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def summary(run: RunRecords) -> dict[str, str]:
    """The figures of a run by name, as text."""
    last, final = run.train[-1], [record for record in run.evaluation if record["final"]]
    seconds = last["seconds"]
    figures = {
        "optimizer steps": f"{last['step']}",
        "training tokens": f"{last['tokens']:,}",
        "training time": f"{seconds / 60:.1f} min",
        "tokens a second (median)": f"{sorted(r['tokens_per_second'] for r in run.train)[len(run.train) // 2]:,.0f}",
        "training loss (last record)": f"{_number(last['loss'])} nats",
        "share of transport steps": _percent(transport_share(run.load)),
    }
    if final:
        figures["held-out bits per byte"] = f"{_number(final[-1]['bits_per_byte'])} ({final[-1]['tokens']:,} tokens)"
        figures["held-out MaxVio by layer"] = _numbers(final[-1]["max_vio"])
    if run.load:
        layers = run.load[-1]["layers"].values()
        figures["training MaxVio by layer (last window)"] = _numbers([layer["max_vio"] for layer in layers])
        figures["dropped routes by layer (last window)"] = ", ".join(_percent(layer["drop_rate"]) for layer in layers)
    return figures


def transport_share(load: list[Record]) -> float | None:
    """Share of transport passes over all windows, in the layer that has most; None if nothing was counted."""
    steps = sum(record["steps"] for record in load)
    if not steps:
        return None
    names = load[-1]["layers"]
    return max(sum(r["steps"] * (r["layers"][name]["transport_share"] or 0.0) for r in load) / steps for name in names)


def at_step(run: RunRecords, step: int) -> dict[str, str]:
    """Loss and balance of a run at one step, as text; only what was recorded there."""
    figures = {}
    for record in run.train:
        if record["step"] == step:
            figures["training loss"] = f"{_number(record['loss'])} nats"
    for record in run.evaluation:
        if record["step"] == step and not record["final"]:
            figures["held-out bits per byte"] = f"{_number(record['bits_per_byte'])} ({record['tokens']:,} tokens)"
            figures["held-out MaxVio by layer"] = _numbers(record["max_vio"])
    for record in run.load:
        if record["step"] == step:
            layers = record["layers"].values()
            figures["training MaxVio by layer"] = _numbers([layer["max_vio"] for layer in layers])
            figures["dropped routes by layer"] = ", ".join(_percent(layer["drop_rate"]) for layer in layers)
    return figures


def _comparison(run: RunRecords, others: list[RunRecords]) -> str:
    parts = []
    for other in others:
        shared = {r["step"] for r in run.train} & {r["step"] for r in other.train}
        if not shared:
            parts.append(f"<p>{html.escape(other.name)} has no record at a step of this run.</p>")
            continue
        step = max(shared)
        mine, theirs = at_step(run, step), at_step(other, step)
        rows = [(name, mine[name], theirs[name]) for name in mine if name in theirs]
        parts.append(f"<h3>At step {step}</h3>{_table(['', run.name, other.name], rows)}")
    return "<h2>Comparison</h2>" + "".join(parts) if parts else ""


def _layer_table(run: RunRecords) -> str:
    if not run.load:
        return "<p>The load monitor was off.</p>"
    keys = (
        "max_vio",
        "max_vio_window",
        "min_vio",
        "cv",
        "effective_experts",
        "dead_share",
        "drop_rate",
        "column_error",
    )
    rows = []
    for name, layer in run.load[-1]["layers"].items():
        rows.append((name, *("-" if layer[key] is None else f"{layer[key]:.3g}" for key in keys)))
    return _table(["layer (last window)", *keys], rows)


def _loss_figure(runs: list[RunRecords]) -> Figure:
    """Training loss and held-out loss over steps, in nats a token."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for run, colour in zip(runs, _cycle(), strict=False):
        axes.plot(
            [r["step"] for r in run.train],
            [_or_nan(r["loss"]) for r in run.train],
            color=colour,
            label=f"{run.name}: training",
        )
        steps, values = [r["step"] for r in run.evaluation], [_or_nan(r["nats_per_token"]) for r in run.evaluation]
        axes.plot(steps, values, "o--", color=colour, markerfacecolor="white", label=f"{run.name}: held out")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats a token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _load_figure(runs: list[RunRecords]) -> Figure:
    """MaxVio over steps, and for each run the load of every expert of every layer in the last window."""
    runs = [run for run in runs if run.load]
    figure = Figure(figsize=(8, 4 + 2.2 * max(len(runs), 1)), layout="constrained")
    top, *maps = figure.subplots(1 + len(runs), 1, height_ratios=[4, *[2.2] * len(runs)], squeeze=False)[:, 0]
    for run, colour in zip(runs, _cycle(), strict=False):
        steps = [record["step"] for record in run.load]
        for index, name in enumerate(run.load[-1]["layers"]):
            values = [_or_nan(record["layers"][name]["max_vio"]) for record in run.load]
            style = ("-", "--", ":", "-.")[index % 4]
            top.plot(steps, values, style, color=colour, label=f"{run.name}, layer {index}")
    top.set(xlabel="optimizer step", ylabel="MaxVio of a training step", title="Load imbalance (0 is even)")
    top.grid(alpha=0.3)
    if 0 < sum(len(run.load[-1]["layers"]) for run in runs) <= 12:
        top.legend()
    loads = [_relative_load(run.load[-1]) for run in runs]
    # One scale for all, so that equal colours mean equal loads.
    most = max((value for load in loads for row in load for value in row if math.isfinite(value)), default=2.0)
    for axes, run, load in zip(maps, runs, loads, strict=True):
        image = axes.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=max(most, 2.0))
        title = f"{run.name}: load of each expert (1 is even), to step {run.load[-1]['step']}"
        axes.set(xlabel="expert", ylabel="layer", title=title, yticks=range(len(load)))
        if len(load[0]) <= 32:
            axes.set_xticks(range(len(load[0])))
        figure.colorbar(image, ax=axes)
    return figure


def _relative_load(window: Record) -> list[list[float]]:
    """Load of each layer's experts over their mean; NaN where a layer has fewer experts than the widest."""
    layers = [layer["load"] for layer in window["layers"].values()]
    width = max(len(load) for load in layers)
    return [[(share or 0.0) * len(load) for share in load] + [math.nan] * (width - len(load)) for load in layers]


def _cycle() -> list[str]:
    return list(_COLOURS) * 8


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    document = text.getvalue()
    return document[document.index("<svg") :]


def _table(head: Sequence[str], rows: Any) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += [
        f"<th scope='row'>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row[1:])
        for row in rows
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(values: Sequence[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.2f}" for value in values)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600 }
svg { width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
</style></head><body>
<h1>$title</h1>
$summary
$comparison
<h2>Loss</h2>
$loss
<h2>Expert load</h2>
$load
$layers
<h2>Configuration</h2>
<details><summary>everything resolved</summary><pre>$config</pre></details>
</body></html>
""")
