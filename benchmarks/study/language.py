"""One run of the language-model study: a DeepSpeed engine of one rank, trained and measured.

Shapes: W steps, E experts, S sources, N MoE layers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from benchmarks.corpora import Texts
from benchmarks.study.engines import build_engine, close_engine, start_process_group
from benchmarks.study.heldout import excerpt, plain, score, swap_words
from benchmarks.study.measure import GateWatch, Passes, mutual_information, numbers, training_balance
from ssr_deepspeed.pretrain.config import DataConfig, ModelConfig
from ssr_deepspeed.pretrain.data import training_batches
from ssr_deepspeed.pretrain.model import MoELanguageModel
from ssr_deepspeed.routing import max_violation

Job = dict[str, Any]

LAST = 100
"""Training steps at the end over which load is measured."""
SWAPPED = (2.5, 5, 10)
"""Percent of the held-out words."""
CURVE_POINTS = 8
# Bytes a source: of the final evaluation, of each share of swapped words, of a point of the curve.
# Together about 14 % of the time of a run of the main table.
HELDOUT, SWAP_HELDOUT, CURVE_HELDOUT = 65_536, 12_288, 2_048
SWAP_SEED = 0
"""The same words are swapped for every arm and seed."""


def train_on(job: Job, texts: Texts) -> dict[str, Any]:
    """Train and measure one run.

    Args:
        job: `model` (keys of `ModelConfig`), `ssr` (the block), `auxiliary_loss`, `steps`,
            `tokens_per_step`, `sequence_length`, `seed` (of weights, order of the text, coins), and
            `micro_batches` of a step, 1 if not given.
        texts: training and held-out text.

    Returns:
        `bits_per_byte`: held out, mean over sources; `bits_per_byte_by_source`; `swapped`: bits per
        byte of the words left, by percent of words swapped, "0" on the same excerpt;
        `max_vio_batch`, `max_vio_global`, `dead_experts`, `mutual_information` (bits; null for one
        source): lists by layer, the first and third over the last 100 training steps;
        `drop_rate`: share of routes without a slot, by capacity factor, if the demand of those
        steps met it; `trained_drop_rate`: what those steps really dropped; `gate_time_share`:
        forward of the gates, without their backward, over the steps' wall time;
        `tokens_per_second`: of the median step; `curve`: `[step, training seconds, bits per byte]`
        on a small part of the held-out text; `seconds`: of the whole run. Or, where the loss
        became NaN or infinite: `diverged`, `step`, `seconds`.

    Raises:
        ValueError: settings that do not fit together.
    """
    began = time.perf_counter()
    run = StudyRun(job, texts)
    try:
        result = run.measure() if run.train() else {"diverged": True, "step": len(run.step_seconds) + 1}
    finally:
        run.close()
    return result | {"seconds": round(time.perf_counter() - began, 2)}


class StudyRun:
    """An engine of one rank, its text, and what its steps leave to measure.

    Args:
        job, texts: as for `train_on`.

    Raises:
        ValueError: settings that do not fit together.
    """

    def __init__(self, job: Job, texts: Texts) -> None:
        _check(job)
        start_process_group()
        self.job, self.texts = job, texts
        self.engine = _build_engine(job, texts.corpus.vocabulary)
        self.watch = GateWatch(self.engine.ssr.gates[name] for name in self.engine.ssr.layers)
        self.length, self.micro_batches = job["sequence_length"], job.get("micro_batches", 1)
        self.batch = job["tokens_per_step"] // self.micro_batches // self.length
        self.step_seconds: list[float] = []
        self.gate_seconds = 0.0
        self.last: deque[Passes] = deque(maxlen=LAST)
        self.curve: list[list[float]] = []
        self._batches = training_batches(
            texts.corpus,
            DataConfig(sequence_length=self.length, seed=job["seed"]),
            first_sample=0,
            micro_batch=self.batch,
            rank=0,
            ranks=1,
        )
        self.engine.train()

    def close(self) -> None:
        """Give the engine's memory back; several runs follow each other in one process."""
        self.watch.close()
        close_engine(self.engine)
        del self.engine

    def step(self) -> bool:
        """One optimizer step; False, before it, if the loss is NaN or infinite."""
        began = time.perf_counter()
        for _ in range(self.micro_batches):
            tokens_BL, labels_BL, _ = next(self._batches)
            loss = self.engine(tokens_BL, labels_BL).loss
            if not math.isfinite(float(loss.detach())):
                return False
            self.engine.backward(loss)
            self.engine.step()
        self.step_seconds.append(time.perf_counter() - began)
        self.last.append(self.watch.take())
        self.gate_seconds += self.last[-1].gate_seconds
        return True

    def train(self) -> bool:
        """All steps; False if the loss became NaN or infinite."""
        steps = self.job["steps"]
        points = {round(steps * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS)}
        for step in range(1, steps + 1):
            if not self.step():
                return False
            if step in points:
                bits = statistics.fmean(self._score(CURVE_HELDOUT)[0].values())
                self.curve.append([step, round(sum(self.step_seconds), 3), round(bits, 5)])
        return True

    def measure(self) -> dict[str, Any]:
        """The result of a finished run, but for its seconds."""
        bits, counts_SNE = self._score(HELDOUT)
        swapped = {"0": statistics.fmean(self._score(SWAP_HELDOUT)[0].values())}
        for percent in SWAPPED:
            swapped[f"{percent:g}"] = statistics.fmean(self._score(SWAP_HELDOUT, percent)[0].values())
        result = {
            "bits_per_byte": statistics.fmean(bits.values()),
            "bits_per_byte_by_source": bits,
            "swapped": swapped,
            "max_vio_global": max_violation(counts_SNE.sum(0).double()).tolist(),
            "mutual_information": between_sources(counts_SNE),
            "gate_time_share": self.gate_seconds / sum(self.step_seconds),
            "tokens_per_second": round(self.job["tokens_per_step"] / statistics.median(self.step_seconds), 1),
            "curve": self.curve,
        }
        return _rounded(result | training_balance(self.last))

    def _score(self, size: int, swapped: float = 0) -> tuple[dict[str, float], torch.Tensor]:
        """Bits per byte by source, and demand `[S, N, E]`."""
        bits, counts = {}, []
        for name, tokens in self.texts.heldout.items():
            part = excerpt(tokens, size)
            text = swap_words(part, swapped, SWAP_SEED) if swapped else plain(part)
            bits[name], counts_NE = score(self.engine, text, self.length, self.batch)
            counts.append(counts_NE)
        self.watch.take()  # what evaluation did is not training's
        return bits, torch.stack(counts)


def between_sources(counts_SNE: torch.Tensor) -> list[float | None]:
    """Mutual information of source and expert by layer, sources weighed equally; None for one source."""
    if len(counts_SNE) < 2:
        return [None] * counts_SNE.shape[1]
    return numbers(mutual_information((counts_SNE / counts_SNE.sum(2, keepdim=True)).transpose(0, 1)))


def _check(job: Job) -> None:
    tokens, least = job["tokens_per_step"], job["sequence_length"] * job.get("micro_batches", 1)
    if tokens % least:
        raise ValueError(f"tokens_per_step = {tokens}; allowed: multiples of sequence_length * micro_batches = {least}")


def _build_engine(job: Job, vocabulary: int) -> DeepSpeedEngine:
    torch.manual_seed(job["seed"])
    config = ModelConfig(**job["model"], auxiliary_loss=job["auxiliary_loss"])
    # The proportions of configs/deepspeed/cpu.json.
    return build_engine(
        MoELanguageModel(config, vocabulary, job["seed"], ep_rank=0),
        {**job["ssr"], "seed": job["seed"]},
        {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        job["steps"],
        {"warmup_num_steps": max(job["steps"] // 5, 2), "cos_min_ratio": 0.05},
        train_batch_size=job["tokens_per_step"] // job["sequence_length"],
        gradient_accumulation_steps=job.get("micro_batches", 1),
    )


def _rounded(value: Any) -> Any:
    """Six decimals are more than any difference here means."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
