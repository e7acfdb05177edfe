"""The language-model study: every arm trained on the same text from the same weights, and measured.

    python -m benchmarks.lm_study --results benchmarks/results/lm_study.jsonl --tables main --workers 2

Each run is one job on one core, a real DeepSpeed engine of one rank, and one line of the results
file. Runs that the file holds are not done again. `python -m benchmarks.study.tables` shows it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.corpora import SOURCES, corpus
from benchmarks.study.arms import ARMS, BEST, COMPARED, MICRO, QUICK, SEARCH
from benchmarks.study.jobs import run_jobs
from benchmarks.study.language import Job, train_on

SMALL = {
    "layers": 2,
    "width": 128,
    "heads": 4,
    "experts": 8,
    "top_k": 2,
    "expert_width": 256,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 2.0,
}
SIZES = ({"experts": 16, "top_k": 1}, {"experts": 64, "top_k": 4, "expert_width": 64})
WIKIPEDIA = ("articles", "leads")
STEPS = 700
"""Of a run of the tables main, sizes and corpora: about two minutes on one core."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run what the results file lacks."""
    options = _parser().parse_args(arguments)
    jobs = [
        job
        for table in options.tables
        for job in TABLES[table]()
        if (not options.arms or job["arm"] in options.arms) and (not options.seeds or job["seed"] in options.seeds)
    ]
    if not jobs:
        sys.exit(f"lm_study: no run of {options.tables} has an arm of {options.arms} and a seed of {options.seeds}")
    try:
        for names in sorted({tuple(job["corpus"]) for job in jobs}):
            corpus(names)  # before the workers ask for it at once
        failed = run_jobs(jobs, train, options.results, options.workers, options.minutes)
    except ValueError as error:
        sys.exit(f"lm_study: {error}")
    if failed:
        sys.exit(f"lm_study: {len(failed)} of {len(jobs)} jobs failed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON-lines file to go on with")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=["main"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, help="start no run later than this")
    return parser


def _jobs(table: str, arms: Iterable[str], seeds: range, **settings: Any) -> Iterator[Job]:
    """One job for each seed and arm; the seeds outside, so that an unfinished table compares all arms."""
    shape = {"tokens_per_step": 2048, "sequence_length": 128}
    for seed, arm in itertools.product(seeds, arms):
        chosen = {"ssr": ARMS[arm].block_for(settings["steps"]), "auxiliary_loss": ARMS[arm].auxiliary_loss}
        yield {"table": table, "arm": arm, "seed": seed} | chosen | shape | settings


def _main() -> Iterator[Job]:
    return _jobs("main", COMPARED, range(3), corpus=SOURCES, model=SMALL, steps=STEPS)


def _sizes() -> Iterator[Job]:
    for size in SIZES:
        # Top-1 is where the entropy of the default matters.
        arms = (*BEST, "carried_wide") if size["top_k"] == 1 else BEST
        yield from _jobs("sizes", arms, range(3), corpus=SOURCES, model={**SMALL, **size}, steps=STEPS)


def _corpora() -> Iterator[Job]:
    for names in (("gutenberg",), WIKIPEDIA):
        yield from _jobs("corpora", BEST, range(3), corpus=names, model=SMALL, steps=STEPS)


def _micro() -> Iterator[Job]:
    """Where the global auxiliary loss differs from the plain one: several micro-batches a step."""
    return _jobs("micro", MICRO, range(3), corpus=SOURCES, model=SMALL, steps=STEPS, micro_batches=4)


def _search() -> Iterator[Job]:
    return _jobs("search", SEARCH, range(2), corpus=("sotu",), model=SMALL, steps=300)


def _quick() -> Iterator[Job]:
    model = {**SMALL, "width": 64, "expert_width": 128}
    # Smaller steps, so that there are enough of them for the models to have learnt more than letters.
    return _jobs("quick", QUICK, range(3), corpus=SOURCES, model=model, steps=600, tokens_per_step=1024)


TABLES = {
    "main": _main,
    "sizes": _sizes,
    "corpora": _corpora,
    "micro": _micro,
    "search": _search,
    "quick": _quick,
}


def train(job: Job) -> dict[str, Any]:
    """Do one job in this process; what stands in the results file."""
    return train_on(job, corpus(job["corpus"]))


if __name__ == "__main__":
    main()
