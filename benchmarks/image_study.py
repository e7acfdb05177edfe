"""Image classification with routers side by side: a small vision transformer with experts.

    python -m benchmarks.image_study --results benchmarks/results/image_study.jsonl --tables main --workers 2
    python -m benchmarks.image_study --tables quick          # a few arms, about 5 minutes on 2 cores
    python -m benchmarks.image_study --tables main --arms carried topk_gate --data digits --seeds 0 --minutes 10

Each run trains a DeepSpeed engine of one process on Fashion-MNIST (about a minute) or on scikit-learn's
digits (a quarter of that), without augmentation, and ends with accuracy on clean and corrupted test
images and the balance of its routers.
The results file is the state: what stands in it is not run again. All runs on one data set have the
same model, batches (for the same seed), test images and corruptions; only the router differs.

Of a result: `accuracy` is of all test images, `corrupted` of the first 2,000 (Fashion-MNIST) or all
(digits). `max_vio_batch`, `dead_experts`, `drop_rate` (routes that a layer of that capacity factor would
not serve) and `trained_drop_rate` are of the last 100 training steps; `max_vio_global` and
`mutual_information` (bits between class and expert, over routes with a slot) of the clean test images.
`curve` holds the step, the seconds of training until then, and the accuracy on 1,000 test images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from benchmarks.study import measure
from benchmarks.study.arms import ARMS, COMPARED, QUICK
from benchmarks.study.engines import build_engine, close_engine, start_process_group
from benchmarks.study.images import CLASSES, CORRUPTIONS, LEVELS, NAMES, Images, corrupt, load_images
from benchmarks.study.jobs import Job, run_jobs
from benchmarks.study.vision import VisionConfig, VisionTransformer
from ssr_deepspeed.hosts.deepspeed_moe import find_gates
from ssr_deepspeed.monitor.metrics import finite
from ssr_deepspeed.monitor.sinks import read_json_lines
from ssr_deepspeed.routing import max_violation

LAST_STEPS = 100
CORRUPTED_IMAGES = 2000
CURVE_IMAGES = 1000
CURVE_POINTS = 6
EVALUATION_BATCH = 100
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.05

MODEL = {
    "layers": 2,
    "width": 64,
    "heads": 4,
    "experts": 8,
    "top_k": 2,
    "expert_width": 64,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 2.0,
}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "main": {
        "fashion": {"model": {**MODEL, "patch": 4}, "steps": 500, "batch": 64},
        "digits": {"model": {**MODEL, "patch": 2}, "steps": 400, "batch": 64},
    },
    "quick": {
        "fashion": {"model": {**MODEL, "patch": 4}, "steps": 150, "batch": 64},
        # As long as the main table's: after half of it the auxiliary loss has not balanced yet.
        "digits": {"model": {**MODEL, "patch": 2}, "steps": 400, "batch": 64},
    },
}
"""By table and data set: what a job holds beside its arm and seed."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Evaluation:
    """Test images through a model in evaluation. L MoE layers, S classes, E experts."""

    accuracy: float
    demand_LE: Tensor
    """float64, routes that each expert was asked to take."""
    table_LSE: Tensor
    """int64, routes with a slot from images of each class to each expert."""


def study_jobs(tables: list[str], arms: list[str] | None, seeds: list[int] | None, data: list[str]) -> list[Job]:
    """The jobs of some tables, seed by seed, so that a study cut short has all arms."""
    return [
        {
            "table": table,
            "arm": arm,
            "ssr": ARMS[arm].block_for(RUNS[table][name]["steps"]),
            "auxiliary_loss": ARMS[arm].auxiliary_loss,
            "data": name,
            **RUNS[table][name],
            "seed": seed,
        }
        for table in tables
        for seed in (SEEDS if seeds is None else seeds)
        for name in data
        for arm in arms or (QUICK if table == "quick" else COMPARED)
    ]


def work(job: Job) -> dict[str, Any]:
    """Train and measure one run; see the module's text for what comes back.

    Raises:
        ValueError: the arm, the data set or the model's shape is unknown or impossible.
        RuntimeError: the training loss is not finite.
    """
    began = time.perf_counter()
    if job["arm"] not in ARMS:
        raise ValueError(f"arm {job['arm']!r} is unknown: choose one of {', '.join(ARMS)}")
    start_process_group()
    torch.manual_seed(job["seed"])
    images = load_images(job["data"])
    engine = build(job, images)
    watch = measure.GateWatch(find_gates(engine.module).values())
    try:
        result = train(engine, watch, images, job)
        result |= final_figures(engine, watch, images)
    finally:
        watch.close()
        close_engine(engine)
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def build(job: Job, images: Images) -> DeepSpeedEngine:
    """The job's engine."""
    pixels = images.train_NHW
    model = VisionTransformer(
        VisionConfig(**job["model"]),
        side=pixels.shape[-1],
        classes=CLASSES,
        mean=float(pixels.mean()),
        deviation=float(pixels.std()),
        seed=job["seed"],
    )
    return build_engine(
        model,
        {**job["ssr"], "seed": job["seed"]},
        {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        job["steps"],
        {"warmup_num_steps": max(2, round(WARMUP_SHARE * job["steps"])), "cos_min_ratio": 0.1},
        train_micro_batch_size_per_gpu=job["batch"],
    )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of training images for ever, in a new order each epoch; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order_N = torch.randperm(count, generator=generator)
        yield from (order_N[at : at + size] for at in range(0, count - size + 1, size))


def train(engine: DeepSpeedEngine, watch: measure.GateWatch, images: Images, job: Job) -> dict[str, Any]:
    """Train for the job's steps; what is measured on the way."""
    if job["batch"] > len(images.train_N):
        raise ValueError(f"batch = {job['batch']} is more than the {len(images.train_N)} training images: lower it")
    order = batches(len(images.train_N), job["batch"], job["seed"])
    steps: list[measure.Passes] = []
    curve: list[list[Any]] = []
    marks = {round(job["steps"] * point / CURVE_POINTS) for point in range(1, CURVE_POINTS + 1)}
    seconds = gate_seconds = 0.0
    engine.train()
    for step in range(1, job["steps"] + 1):
        began = time.perf_counter()
        chosen = next(order)
        logits, l_aux = engine(images.train_NHW[chosen])
        loss = F.cross_entropy(logits, images.train_N[chosen]) + job["auxiliary_loss"] * l_aux
        engine.backward(loss)
        engine.step()
        seconds += time.perf_counter() - began
        passes = watch.take()
        gate_seconds += passes.gate_seconds
        steps = [*steps[1 - LAST_STEPS :], passes]
        if step in marks:
            if not loss.isfinite():
                raise RuntimeError(f"the training loss is {float(loss)} at step {step} of {job}: lower LEARNING_RATE")
            some = slice(CURVE_IMAGES)
            accuracy = evaluate(engine, watch, images.test_NHW[some], images.test_N[some]).accuracy
            curve.append([step, round(seconds, 3), accuracy])
    tokens = job["steps"] * job["batch"] * engine.module.tokens
    return {
        **measure.training_balance(steps),
        "gate_time_share": finite(gate_seconds / seconds),
        "tokens_per_second": round(tokens / seconds, 1),
        "curve": curve,
    }


def final_figures(engine: DeepSpeedEngine, watch: measure.GateWatch, images: Images) -> dict[str, Any]:
    """Accuracy and routing on the test images, clean and corrupted."""
    clean = evaluate(engine, watch, images.test_NHW, images.test_N)
    pixels_NHW, classes_N = images.test_NHW[:CORRUPTED_IMAGES], images.test_N[:CORRUPTED_IMAGES]
    corrupted = {
        kind: {
            str(level): evaluate(engine, watch, corrupt(pixels_NHW, kind, level), classes_N).accuracy
            for level in LEVELS
        }
        for kind in CORRUPTIONS
    }
    return {
        "accuracy": clean.accuracy,
        "corrupted": corrupted,
        "max_vio_global": measure.numbers(max_violation(clean.demand_LE)),
        "mutual_information": measure.numbers(measure.mutual_information(clean.table_LSE)),
    }


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, watch: measure.GateWatch, pixels_NHW: Tensor, classes_N: Tensor) -> Evaluation:
    """Classify images in evaluation mode; the engine is in training mode afterwards."""
    engine.eval()
    right, table_LSE = 0, torch.zeros((), dtype=torch.int64)
    for pixels, classes in zip(pixels_NHW.split(EVALUATION_BATCH), classes_N.split(EVALUATION_BATCH), strict=True):
        logits, _ = engine(pixels)
        right += int((logits.argmax(1) == classes).sum())
        class_T = classes.repeat_interleave(engine.module.tokens)
        tables = [
            measure.count_by_source(routes_KT, class_T, CLASSES, engine.module.experts) for routes_KT in watch.routes
        ]
        table_LSE = table_LSE + torch.stack(tables)
    engine.train()
    return Evaluation(round(right / len(classes_N), 6), watch.take().demand_LE, table_LSE)


def summary(path: Path, jobs: list[Job]) -> Iterator[str]:
    """The recorded jobs as lines of a table, means over seeds."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in read_json_lines(path):
        if record["job"] in jobs:
            rows[record["job"]["table"], record["job"]["data"], record["job"]["arm"]].append(record["result"])
    head = ("table", "data", "router", "seeds", "accuracy", "corrupted", "MaxVio", "test MaxVio", "dropped", "s")
    yield "{:6} {:8} {:30} {:>5} {:>9} {:>9} {:>7} {:>11} {:>8} {:>5}".format(*head)
    for (table, data, arm), results in sorted(rows.items()):
        figures = [
            statistics.mean(result["accuracy"] for result in results),
            statistics.mean(
                accuracy for result in results for kind in result["corrupted"].values() for accuracy in kind.values()
            ),
            statistics.mean(max(result["max_vio_batch"]) for result in results),
            statistics.mean(max(result["max_vio_global"]) for result in results),
            statistics.mean(result["trained_drop_rate"] for result in results),
            statistics.mean(result["seconds"] for result in results),
        ]
        numbers = "{:9.3f} {:9.3f} {:7.2f} {:11.2f} {:8.1%} {:5.0f}".format(*figures)
        yield f"{table:6} {data:8} {ARMS[arm].label:30} {len(results):5} {numbers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/image_study.jsonl"))
    parser.add_argument("--tables", nargs="+", choices=RUNS, default=["main"])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--minutes", type=float, help="start no run later than this")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all of the table")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the table")
    parser.add_argument("--data", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args()
    try:
        for name in options.data:  # fetched here, once, and not by two workers at a time
            load_images(name)
        jobs = study_jobs(options.tables, options.arms, options.seeds, options.data)
        failed = run_jobs(jobs, work, options.results, options.workers, options.minutes)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print("\n".join(summary(options.results, jobs)))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; start again to repeat them")


if __name__ == "__main__":
    main()
