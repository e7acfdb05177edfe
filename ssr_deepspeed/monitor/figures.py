"""What the page shows of some runs: numbers as they were recorded, few enough for a browser.

Of a long run evenly chosen windows are taken, the last among them; their numbers are those of the records. A run may
have load records alone, or none yet: what is missing is left out.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ssr_deepspeed.monitor.names import LESS_IS_WORSE, METRICS
from ssr_deepspeed.monitor.records import Record, RunLog

# Of a page with all its runs: windows of each curve; metrics of layers, at ten bytes; loads of maps, at three bytes.
_WINDOWS, _CELLS, _LOADS = 1000, 1_500_000, 3_000_000
_ALERTS = 500
# Loads are written in thousandths; this one stands for a load that is not known.
_UNKNOWN = 65535
_LISTED_LAYERS = 8


def page_data(logs: Sequence[RunLog]) -> Record:
    """Everything that the page shows, ready for JSON."""
    names = run_names(logs)
    return {
        "metrics": METRICS,
        "less_is_worse": sorted(LESS_IS_WORSE),
        "runs": [_run(log, name, len(logs)) for log, name in zip(logs, names, strict=True)],
        "comparison": comparison(logs) if len(logs) > 1 else [],
    }


def run_names(logs: Sequence[RunLog]) -> list[str]:
    """The runs' names, or their paths where two runs have one name."""
    names = [log.name for log in logs]
    return [
        name if names.count(name) == 1 else str(log.file.parent.resolve())
        for name, log in zip(names, logs, strict=True)
    ]


def _run(log: RunLog, name: str, runs: int) -> Record:
    train = log.records("train", _WINDOWS)
    evaluation = log.records("evaluation", _WINDOWS)
    load, layers = _loads(log, runs)
    steps = [record["step"] for record in load]
    alerts = _alerts(log.records("alert"))
    return {
        "name": name,
        "summary": list(summary(log, train, evaluation, load).items()),
        "train": {key: [record.get(key) for record in train] for key in ("step", "loss")},
        "evaluation": {key: [record.get(key) for record in evaluation] for key in ("step", "nats_per_token")},
        "layers": layers,
        "windows": steps,
        "steps": [record.get("steps") for record in load],
        "model": {metric: _of_model(load, metric, layers) for metric in METRICS},
        "by_layer": {metric: found for metric in METRICS if (found := _of_layers(load, metric, layers))},
        "frames": _frames(log, steps, runs),
        "alerts": alerts[:_ALERTS],
        "config": log.config,
        "notes": _notes(log, load, len(alerts)),
    }


def _loads(log: RunLog, runs: int) -> tuple[list[Record], list[str]]:
    """The windows to show, and the layers of the last one."""
    last = log.records("load", steps=log.steps("load")[-1:])
    layers = list(last[-1].get("layers", {})) if last else []
    most = _CELLS // (runs * len(METRICS) * max(len(layers), 1))
    return log.records("load", max(2, min(_WINDOWS, most))), layers


def _notes(log: RunLog, load: list[Record], alerts: int) -> list[str]:
    notes, windows = [], len(log.steps("load"))
    if len(load) < windows:
        notes.append(f"{len(load):,} of {windows:,} windows are shown, evenly chosen, the last among them.")
    if log.damaged:
        notes.append(f"{log.damaged:,} lines of {log.file.name} are no records and were left out.")
    if alerts > _ALERTS:
        notes.append(f"{_ALERTS} of {alerts:,} alerts are shown: those that are open, then the latest.")
    return notes


def _of_model(load: list[Record], metric: str, layers: list[str]) -> Record:
    """Mean and worst layer of each window."""
    found = [record.get("model", {}).get(metric, {}) for record in load]
    index = {name: i for i, name in enumerate(layers)}
    return {
        "mean": [one.get("mean") for one in found],
        "worst": [one.get("worst") for one in found],
        "layer": [index.get(one.get("layer", "")) for one in found],
    }


def _of_layers(load: list[Record], metric: str, layers: list[str]) -> list[list[float | None]]:
    """A metric of every layer and window; empty where no layer has it."""
    rows = [[record.get("layers", {}).get(layer, {}).get(metric) for record in load] for layer in layers]
    return rows if any(value is not None for row in rows for value in row) else []


def _frames(log: RunLog, windows: list[int], runs: int) -> Record:
    """Load of every layer's experts in as many of these windows as fit: two bytes each, layer by layer."""
    known = set(log.steps("experts"))
    places = [place for place, step in enumerate(windows) if step in known]
    last = log.loads(windows[places[-1]]) if places else None
    if last is None:
        return {"places": [], "experts": [], "scale": 1, "loads": ""}
    experts = [len(row) for row in last]
    most = max(2, _LOADS // (runs * max(sum(experts), 1)))
    if len(places) > most:
        places = [places[(len(places) - 1) * i // (most - 1)] for i in range(most)]
    records = {record["step"]: record for record in log.records("experts", steps={windows[p] for p in places})}
    # A run that went on as another model has earlier windows of another shape.
    rows = {place: records[windows[place]]["load_over_mean"] for place in places if windows[place] in records}
    rows = {place: loads for place, loads in rows.items() if [len(row) for row in loads] == experts}
    loads_FX = np.array([[share for row in loads for share in row] for loads in rows.values()], dtype=float)
    greatest = float(np.nanmax(loads_FX, initial=0.0))
    scale = 1000
    while scale > 1 and greatest * scale >= _UNKNOWN:
        scale //= 10
    whole_FX = np.where(np.isnan(loads_FX), _UNKNOWN, np.minimum(np.rint(loads_FX * scale), _UNKNOWN - 1))
    return {
        "places": list(rows),
        "experts": experts,
        "scale": scale,
        "loads": base64.b64encode(whole_FX.astype("<u2").tobytes()).decode(),
    }


def _alerts(records: list[Record]) -> list[Record]:
    """One row an alert, those that are not over first, then the latest."""
    rows: list[Record] = []
    open_rows: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = (record.get("alert"), record.get("layer"), record.get("expert"))
        if record.get("state") == "raised" and key not in open_rows:
            row = {name: record.get(name) for name in ("alert", "layer", "expert", "since", "value", "threshold")}
            row |= {"over": None, "advice": record.get("advice")}
            rows.append(row)
            open_rows[key] = row
        elif record.get("state") == "cleared" and key in open_rows:
            open_rows.pop(key)["over"] = record["step"]
    return sorted(reversed(rows), key=lambda row: row["over"] is not None)


def summary(log: RunLog, train: list[Record], evaluation: list[Record], load: list[Record]) -> dict[str, str]:
    """The figures of a run by name, as text."""
    figures = {}
    if train or load:
        figures["optimizer steps"] = f"{max(records[-1]['step'] for records in (train, load) if records):,}"
    if train:
        last, speeds = train[-1], sorted(r["tokens_per_second"] for r in train if r.get("tokens_per_second"))
        if "tokens" in last:
            figures["training tokens"] = f"{last['tokens']:,}"
        if "seconds" in last:
            figures["training time"] = f"{last['seconds'] / 60:.1f} min"
        figures["tokens a second (median)"] = f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-"
        figures |= _at_speed(train)
        figures["training loss (last record)"] = f"{_number(last.get('loss'))} nats"
    if load:
        figures["share of transport steps"] = _percent(transport_share(load))
    figures |= _at_evaluation([record for record in evaluation if record.get("final")][-1:])
    if load:
        figures |= {f"{name} (last window)": text for name, text in _at_load(load[-1]).items()}
        figures["alerts that are not over"] = str(len(log.raised()))
        figures["last window written"] = _date(load[-1].get("time"))
    return figures


def _at_speed(train: list[Record]) -> dict[str, str]:
    """Medians of what the records of training say of the machine, where they do."""
    figures = {}
    for name, key in (
        ("model FLOP/s utilisation (median)", "mfu"),
        ("time waiting for data (median)", "data_wait_share"),
        ("time in gates, forwards (median)", "gate_time_share"),
    ):
        shares = sorted(record[key] for record in train if isinstance(record.get(key), int | float))
        if shares:
            figures[name] = _percent(shares[len(shares) // 2])
    if train[-1].get("peak_memory_bytes"):
        figures["peak memory of a rank"] = f"{train[-1]['peak_memory_bytes'] / 2**30:.2f} GiB"
    return figures


def transport_share(load: list[Record]) -> float | None:
    """Share of transport passes over all windows, in the layer that has most; None if nothing was counted."""
    steps = sum(record.get("steps", 0) for record in load)
    if not steps:
        return None
    shares = [
        sum(r["steps"] * (r["layers"].get(name, {}).get("transport_share") or 0.0) for r in load if r.get("layers"))
        for name in load[-1].get("layers", {})
    ]
    return max(shares) / steps if shares else None


def comparison(logs: Sequence[RunLog]) -> list[Record]:
    """Figures of all runs at the last step at which all have a record of the kind."""
    rows = []
    for kind, figures in (("train", _at_train), ("evaluation", _at_evaluation), ("load", _at_load_records)):
        shared = set.intersection(*(set(log.steps(kind)) for log in logs))
        if not shared:
            continue
        step = max(shared)
        found = [figures(log.records(kind, steps={step})) for log in logs]
        names = [name for name in found[0] if all(name in one for one in found)]
        rows += [{"figure": name, "step": step, "values": [one[name] for one in found]} for name in names]
    return rows


def _at_train(records: list[Record]) -> dict[str, str]:
    return {"training loss": f"{_number(records[-1]['loss'])} nats"}


def _at_evaluation(records: list[Record]) -> dict[str, str]:
    """Of a step's evaluations, on some held-out text while training and on all of it at the end."""
    figures = {}
    for record in records:
        which = "" if record.get("final") else " (part)"
        figures[f"held-out bits per byte{which}"] = f"{_number(record['bits_per_byte'])} ({record['tokens']:,} tokens)"
        figures[f"held-out MaxVio by layer{which}"] = _numbers(record["max_vio"])
    return figures


def _at_load_records(records: list[Record]) -> dict[str, str]:
    return _at_load(records[-1])


def _at_load(record: Record) -> dict[str, str]:
    layers = list(record.get("layers", {}).values())
    return {
        "training MaxVio by layer": _numbers([layer.get("max_vio") for layer in layers]),
        "dropped routes by layer": _numbers([layer.get("drop_rate") for layer in layers], _percent),
    }


def _date(seconds: float | None) -> str:
    """Only told: clocks jump, and nothing is computed from them."""
    try:
        return "-" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _numbers(values: Sequence[float | None], text: Any = _two_digits) -> str:
    """Of each layer, or of many layers mean and largest."""
    if len(values) <= _LISTED_LAYERS:
        return ", ".join(map(text, values))
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"mean {text(sum(known) / len(known))}, largest {text(max(known))}" if known else "-"
