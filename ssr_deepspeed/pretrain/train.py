"""The training run: engine, loop, records, checkpoints, report."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from datasets.utils.logging import disable_progress_bar
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from tqdm import tqdm

from ssr_deepspeed.collectives import attempt, gather_objects
from ssr_deepspeed.hosts.engine import initialize
from ssr_deepspeed.hosts.scaler import scales_loss
from ssr_deepspeed.monitor.records import METRICS, RunLog
from ssr_deepspeed.monitor.report import write_report
from ssr_deepspeed.monitor.sinks import JsonLines
from ssr_deepspeed.pretrain import data
from ssr_deepspeed.pretrain.checkpoint import Checkpoints, NotSavedError
from ssr_deepspeed.pretrain.config import DataConfig, RunConfig
from ssr_deepspeed.pretrain.deepspeed_json import check_batch
from ssr_deepspeed.pretrain.evaluate import evaluate
from ssr_deepspeed.pretrain.folder import BEGINNING, Existing, begin, claim
from ssr_deepspeed.pretrain.manifest import Manifest, choose
from ssr_deepspeed.pretrain.model import MoELanguageModel
from ssr_deepspeed.pretrain.prepare import prepare
from ssr_deepspeed.pretrain.progress import Progress
from ssr_deepspeed.pretrain.ranks import check_layout
from ssr_deepspeed.pretrain.signals import Agreement, Stopped, say, say_once


class Run:
    """One pretraining run in its folder, on all ranks of an initialised process group.

    Args:
        config: the settings.
        folder: gets `config.json`, `metrics.jsonl`, `checkpoints/`, `report.html` and the PNGs.
        existing: what to do with a run that the folder holds: refuse to start, go on from its
            newest whole checkpoint (`"weights"`: also at another number of ranks or `ep_size`), or remove it.
        compare: folders of other runs to show in the report.
        asked: the signal that this process was asked to stop by, 0 for none.
        moved: told where this rank is, as `Watch.moved` is.

    Raises:
        ValueError: on every rank alike, for data or settings that cannot be used, a folder that
            holds a run already, a checkpoint of other settings, none that is whole, or nothing to compare with.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        existing: Existing = "refuse",
        compare: Sequence[Path] = (),
        *,
        asked: Callable[[], int] = lambda: 0,
        moved: Callable[..., None] = lambda where, alone=False: None,
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.folder, self.compare, self.moved = folder, compare, moved
        _check_equal(config, existing)
        config.check_ranks(self.ranks)
        check_layout(config.model, self.ranks)
        check_batch(config.deepspeed, self.ranks)
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        prepared = _together(lambda: prepare(config.data), here=local_rank == 0)
        found = _together(lambda: self._open(prepared[self.rank - local_rank], config.data), here=True)
        _check_fingerprints(found)
        config = replace(config, data=replace(config.data, fingerprint=self.corpus.fingerprint))
        self.config = _with_monitor(config, folder)
        self.moved("choosing a checkpoint")
        start = self._claim(existing)
        self.moved("building the engine")
        torch.manual_seed(config.seed + self.rank)
        self.engine = _build_engine(self.config, self.corpus.vocabulary, self.rank)
        self.checkpoints = Checkpoints(
            self.engine, folder / "checkpoints", config.keep_checkpoints, config.model.ep_size
        )
        self.stop = Agreement(asked, config.collective_timeout)
        self.first_step, self.samples, self.seconds = 0, 0, 0.0
        self.owes_evaluation, self._stopped_by = False, 0
        self.losses: list[torch.Tensor] = []
        """Of this rank's micro-batches since the last record."""
        if start:
            self.first_step, self.samples, self.seconds = start.step, start.samples, start.seconds
            self.owes_evaluation = start.owes_evaluation
            self.losses = self.checkpoints.load(start)
        self.sink = JsonLines(folder / METRICS) if self.rank == 0 else None

    def _open(self, prepared: Path, config: DataConfig) -> str:
        self.corpus = data.open_corpus(prepared, config)
        return self.corpus.fingerprint

    def _claim(self, existing: Existing) -> Manifest | None:
        """Make the folder this run's, before the engine is built; the checkpoint to go on from."""
        settings = self.config.to_dict()

        def lock() -> None:
            for folder in self.compare:
                RunLog(folder)  # says so where there is none
            self._lock = claim(self.folder, settings, existing)

        _together(lock, here=self.rank == 0)
        start: Manifest | None = None
        damages: list[str] = []
        if existing in ("resume", "weights"):
            start, damages = choose(self.folder / "checkpoints")
        if start:
            _check_start(start, self.ranks, self.config.model.ep_size, existing)
        _together(lambda: begin(self.folder, settings, start), here=self.rank == 0)
        for damage in damages:
            say_once(f"{damage}: going on from the one before, of step {start.step if start else 0}")
        if existing in ("resume", "weights") and self.rank == 0:
            step = start.step if start else 0
            anew = ""
            if start and (start.ranks, start.ep_size) != (self.ranks, self.config.model.ep_size):
                anew = (
                    f": weights of {start.ranks} ranks with ep_size {start.ep_size}, the optimizer's moments begin anew"
                )
            print(f"resuming {self.folder} after step {step} of {self.config.steps}{anew}", flush=True)
        return start

    def train(self) -> dict[str, Any]:
        """Train to the last step, save, and evaluate on all held-out text. The last evaluation.

        Raises:
            Stopped: on every rank alike, after a signal and when all have saved.
            NotSavedError: on every rank alike, when the checkpoint at the end or at a signal could not be written.
        """
        engine, config = self.engine, self.config
        micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
        batch = micro * accumulation * self.ranks
        batches = data.training_batches(
            self.corpus,
            config.data,
            first_sample=self.samples,
            micro_batch=micro,
            rank=self.rank,
            ranks=self.ranks,
        )
        progress = self.progress = Progress(
            engine, config, self.corpus.vocabulary, self.first_step, self.samples, self.seconds
        )
        engine.train()
        if self.owes_evaluation:
            progress.pause(self._evaluate_on_the_way)
            if self.owes_evaluation:  # stopped again, at the checkpoint it began from
                raise Stopped(self._stopped_by, self.first_step)
        for step in range(self.first_step + 1, config.steps + 1):
            self.stop.ask()
            for _ in range(accumulation):
                self.moved(f"in step {step}")
                tokens_BL, labels_BL, _ = progress.fetch(batches)
                tokens_BL = tokens_BL.to(engine.device, non_blocking=True)
                output = engine(tokens_BL, labels_BL.to(engine.device, non_blocking=True))
                engine.backward(output.loss)
                engine.step()
                self.losses.append(output.loss.detach())
            self.samples += batch
            progress.advance()
            if progress.is_due(step):
                self._log(progress, step)
            # After the step's records, which a run resumed from here will not write again.
            progress.pause(partial(self._end, step, self.stop.agreed()))
        progress.close()
        if self.rank == 0:
            print("evaluating on all held-out text", flush=True)
        result = self._evaluate(0, final=True)
        if result is None:
            raise Stopped(self._stopped_by, config.steps)
        return result

    def _log(self, progress: Progress, step: int) -> None:
        loss, record = progress.record(self.losses)
        self._record(record)
        self.losses.clear()
        if not math.isfinite(loss) and not scales_loss(self.engine):
            # The mean is the same on every rank, so every rank stops here.
            raise RuntimeError(
                f"the training loss is {loss} in the steps up to {step}: lower deepspeed.optimizer.params.lr "
                "and start anew, or --resume from the last checkpoint"
            )

    def _end(self, step: int, number: int) -> None:
        """What is due after a step: evaluation, checkpoint, and where a signal says so, the end."""
        config = self.config
        evaluates = config.eval_every and step % config.eval_every == 0
        saves = config.checkpoint_every and step % config.checkpoint_every == 0
        if evaluates:
            self.owes_evaluation = True
            if not number:
                self._evaluate_on_the_way()
                number = self.stop.at_once()
        if saves or number or step == config.steps:
            self._save(must=bool(number) or step == config.steps)
            number = number or self.stop.at_once()
        if number:
            if self.checkpoints.newest != step:
                self._save(must=True)
            raise Stopped(number, step)

    def _save(self, must: bool) -> None:
        where = f"saving step {self.engine.global_steps}"
        self.moved(where, alone=True)
        problem = self.checkpoints.save(
            self.samples, self.progress.seconds, self.losses, self.owes_evaluation, partial(self.moved, where)
        )
        if problem and must:
            raise NotSavedError(problem)
        if problem:
            say_once(f"WARNING: {problem}. Training goes on; the next try is in {self.config.checkpoint_every} steps")

    def _evaluate_on_the_way(self) -> None:
        self.owes_evaluation = self._evaluate(self.config.eval_sequences) is None

    def _evaluate(self, limit: int, final: bool = False) -> dict[str, Any] | None:
        """Evaluate and record it. None where a signal stopped it: nothing is recorded then."""
        engine = self.engine
        batches = data.heldout_batches(
            self.corpus,
            self.config.data,
            limit=limit,
            micro_batch=engine.train_micro_batch_size_per_gpu(),
            rank=self.rank,
            ranks=self.ranks,
        )
        self.stop.ask()
        found = evaluate(engine, batches, self.corpus, self._stops)
        self.stop.agreed()
        if found is None:
            return None
        result = {"kind": "evaluation", "step": engine.global_steps, "final": final, **found}
        self._record(result)
        if self.rank == 0:
            bits = "-" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.3f}"
            which = "all" if final or not limit else "some"
            tqdm.write(
                f"step {result['step']}: {bits} bits per byte on {which} held-out text, {result['tokens']:,} tokens"
            )
        return result

    def _stops(self) -> bool:
        """Called after each batch of an evaluation."""
        self.moved(f"evaluating after step {self.engine.global_steps}")
        self._stopped_by = self.stop.agreed()
        self.stop.ask()
        return bool(self._stopped_by)

    def _record(self, record: dict[str, Any]) -> None:
        if self.sink:
            try:
                self.sink.write(record)
            except OSError as error:  # it waits for the next record that finds room
                say(f"WARNING: cannot write {self.sink.path}: {error.strerror}. Training goes on")

    def report(self) -> None:
        """Write `report.html` and its pictures; rank 0 alone."""
        if self.rank == 0:
            write_report(self.folder, self.compare)
            print(f"report: {self.folder / 'report.html'}", flush=True)


def _build_engine(config: RunConfig, vocabulary: int, rank: int) -> DeepSpeedEngine:
    if config.model.activation_checkpointing == "deepspeed":
        deepspeed.checkpointing.configure(None, deepspeed_config=config.deepspeed)
    model = MoELanguageModel(config.model, vocabulary, config.seed, rank % config.model.ep_size)
    decay = config.deepspeed.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
    weights = list(model.parameters())
    groups = [
        {"name": "matrices", "params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": decay},
        {"name": "gains", "params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    groups = split_params_into_different_moe_groups_for_optimizer(groups)
    groups = [group for group in groups if group["params"]]
    engine, *_ = initialize(model=model, model_parameters=groups, config=config.deepspeed)
    return engine


def _with_monitor(config: RunConfig, folder: Path) -> RunConfig:
    """The load monitor reports at every progress record and into the run's metrics, unless set otherwise."""
    block = dict(config.deepspeed["ssr"])
    block["monitor"] = {"interval": config.log_every, "path": str(folder / METRICS), **block.get("monitor", {})}
    return replace(config, deepspeed={**config.deepspeed, "ssr": block})


def _check_start(start: Manifest, ranks: int, ep_size: int, existing: Existing) -> None:
    if existing == "resume" and (start.ranks, start.ep_size) != (ranks, ep_size):
        raise ValueError(
            f"the checkpoint {start.tag} was written by {start.ranks} ranks with model.ep_size = {start.ep_size}; this "
            f"run has {ranks} and {ep_size}: resume as it was, or with `--resume weights`, which begins the "
            "optimizer's moments anew"
        )


def _check_equal(config: RunConfig, existing: Existing) -> None:
    """Each machine has read its own files and its own command line. Where the text lies may differ."""
    own = {**config.to_dict(), BEGINNING: existing}
    own["data"] = {key: value for key, value in own["data"].items() if key not in ("source", "prepared", "cache")}
    settings = gather_objects(own)
    for rank, other in enumerate(settings):
        different = [key for key, value in settings[0].items() if other[key] != value]
        if different:
            raise ValueError(
                f"{different[0]} is not on rank {rank} what it is on rank 0: give the same files and flags to every "
                "machine; ssr-preflight names the values"
            )


def _check_fingerprints(found: list[str]) -> None:
    other = [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
    if other:
        raise ValueError(
            f"ranks {other} have other text than rank 0: its fingerprint is {found[other[0]]!r} there and "
            f"{found[0]!r} here; prepare it once with ssr-prepare and give every machine the same folder"
        )


def _together(work: Callable[[], Any], here: bool) -> list[Any]:
    """Do `work` on the ranks where `here` holds and wait for it; the results by rank.

    Raises:
        ValueError: on every rank, the first error that any of them met.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
    gathered = gather_objects(attempt(work) if here else (None, None))
    for _, found in gathered:
        if found:
            raise ValueError(found)
    return [result for result, _ in gathered]
