"""Runs made of records, for tests of what reads them."""

import json
import random

from ssr_deepspeed.monitor.names import LESS_IS_WORSE, METRICS
from ssr_deepspeed.monitor.sinks import JsonLines, load_records


def load_report(step, loads, seed=0, layer="layers.{}.gate", **figures):
    """A load report of layers with these routes by expert; the metrics are the loads' own or drawn."""
    draw = random.Random(f"{seed} {step}")
    layers = {}
    for index, load in enumerate(loads):
        found = {metric: round(draw.uniform(0, 1), 6) for metric in METRICS}
        found["max_vio"] = round(max(load) * len(load) / sum(load) - 1, 6)
        layers[layer.format(index)] = {**found, **figures, "load": [round(one / sum(load), 6) for one in load]}
    model = {}
    for metric in METRICS:
        known = {name: one[metric] for name, one in layers.items() if one[metric] is not None}
        if known:
            worst = (min if metric in LESS_IS_WORSE else max)(known, key=known.get)
            mean = round(sum(known.values()) / len(known), 6)
            model[metric] = {"mean": mean, "worst": known[worst], "layer": worst}
    return {"kind": "load", "step": step, "steps": 5, "time": 1.8e9 + step, "model": model, "layers": layers}


def routes(step, layer, experts):
    """Routes of the experts of a layer in the window that ends there."""
    draw = random.Random(1000 * step + layer)
    return [draw.randint(0, 60) for _ in range(experts)]


def write_load(folder, steps, experts=(8, 8, 4), **options):
    """Append windows of five steps, those after step `steps[0]` up to `steps[1]`."""
    sink = JsonLines(folder / "metrics.jsonl")
    for step in range(steps[0] + 5, steps[1] + 1, 5):
        loads = [routes(step, layer, width) for layer, width in enumerate(experts)]
        for record in load_records(load_report(step, loads, **options)):
            sink.write(record)
    sink.close()
    return folder


def write_run(folder, steps=20, **options):
    """A run of the pretraining command: configuration, training records, load and evaluation."""
    write_load(folder, (0, steps), **options)
    sink = JsonLines(folder / "metrics.jsonl")
    for step in range(5, steps + 1, 5):
        sink.write({"kind": "train", "step": step, "tokens": step * 100, "loss": 5 - step / 10, "learning_rate": 1e-3,
                    "gradient_norm": None, "tokens_per_second": 1000.0, "seconds": step})  # fmt: skip
        sink.write({"kind": "evaluation", "step": step, "final": False, "bits_per_byte": 4 - step / 10,
                    "nats_per_token": 3 - step / 10, "tokens": 99, "max_vio": [0.6, 0.0]})  # fmt: skip
    sink.write({"kind": "evaluation", "step": steps, "final": True, "bits_per_byte": 2.5, "nats_per_token": 1.7,
                "tokens": 12345, "max_vio": [0.61, 0.02]})  # fmt: skip
    sink.close()
    (folder / "config.json").write_text(json.dumps({"data": {"sequence_length": 64}}))
    return folder
