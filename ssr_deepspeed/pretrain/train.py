"""The training run: engine, loop, records, checkpoints, report."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from datasets.utils.logging import disable_progress_bar
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from tqdm import tqdm

from ssr_deepspeed.collectives import gather_objects
from ssr_deepspeed.hosts.engine import initialize
from ssr_deepspeed.monitor.records import METRICS, RunLog
from ssr_deepspeed.monitor.report import write_report
from ssr_deepspeed.monitor.sinks import JsonLines, read_json_lines
from ssr_deepspeed.pretrain import checkpoint, data
from ssr_deepspeed.pretrain.config import ModelConfig, RunConfig, check_ranks
from ssr_deepspeed.pretrain.evaluate import evaluate
from ssr_deepspeed.pretrain.folder import Existing, claim
from ssr_deepspeed.pretrain.model import MoELanguageModel
from ssr_deepspeed.pretrain.progress import Progress


class Run:
    """One pretraining run in its folder, on all ranks of an initialised process group.

    Args:
        config: the settings.
        folder: gets `config.json`, `metrics.jsonl`, `checkpoints/`, `report.html` and the PNGs.
        existing: what to do with a run that the folder holds: refuse to start, go on from its
            latest checkpoint, or remove it.
        compare: folders of other runs to show in the report.

    Raises:
        ValueError: on every rank alike, for data or settings that cannot be used, a folder that
            holds a run already, a checkpoint of other settings, or nothing to compare with.
    """

    def __init__(
        self, config: RunConfig, folder: Path, existing: Existing = "refuse", compare: Sequence[Path] = ()
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.folder, self.compare = folder, compare
        self.config = _with_monitor(config, folder)
        check_ranks(config.ranks, self.ranks)
        _check_layout(config.model, self.ranks)
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        prepared = _together(lambda: data.prepare(config.data), here=local_rank == 0)
        self.corpus = data.open_corpus(prepared[self.rank - local_rank], config.data.sequence_length)
        _together(lambda: self._claim(existing), here=self.rank == 0)
        torch.manual_seed(config.seed + self.rank)
        self.engine = _build_engine(self.config, self.corpus.vocabulary, self.rank)
        self.first_step = checkpoint.load(self.engine, folder / "checkpoints") if existing == "resume" else 0
        self.sink: JsonLines | None = None
        if self.rank == 0:
            self.sink = JsonLines(folder / METRICS)
            if existing == "resume":
                print(f"resuming {folder} after step {self.first_step} of {config.steps}", flush=True)

    def _claim(self, existing: Existing) -> None:
        """Rank 0's part before the engine is built."""
        for folder in self.compare:
            RunLog(folder)  # says so where there is none
        self._lock = claim(self.folder, self.config.to_dict(), existing)

    def train(self) -> dict[str, Any]:
        """Train to the last step, evaluate on all held-out text, and save. The last evaluation."""
        engine, config = self.engine, self.config
        micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
        batches = data.training_batches(
            self.corpus,
            config.data,
            first_step=self.first_step,
            micro_batch=micro,
            accumulation=accumulation,
            rank=self.rank,
            ranks=self.ranks,
        )
        progress = Progress(
            config, self.first_step, micro * accumulation * self.ranks, self.rank, self._seconds_so_far()
        )
        losses = []
        engine.train()
        for step in range(self.first_step + 1, config.steps + 1):
            for _ in range(accumulation):
                tokens_BL, labels_BL, _ = next(batches)
                output = engine(tokens_BL.to(engine.device), labels_BL.to(engine.device))
                engine.backward(output.loss)
                engine.step()
                losses.append(output.loss.detach())
            progress.advance()
            if step % config.log_every == 0 or step == config.steps:
                loss = _mean_over_ranks(losses)
                self._record(progress.record(engine, loss))
                losses.clear()
                if not math.isfinite(loss) and not engine.fp16_enabled():
                    # The mean is the same on every rank, so every rank stops here.
                    raise RuntimeError(
                        f"the training loss is {loss} in the steps up to {step}: lower deepspeed.optimizer.params.lr "
                        "and start anew, or --resume from the last checkpoint"
                    )
            if config.eval_every and step % config.eval_every == 0:
                progress.pause(lambda: self._evaluate(config.eval_sequences))
            # After the step's records, which a run resumed from here will not write again.
            if config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps:
                progress.pause(lambda: checkpoint.save(engine, self.folder / "checkpoints", config.keep_checkpoints))
        progress.close()
        if self.first_step < config.steps:
            checkpoint.save(engine, self.folder / "checkpoints", config.keep_checkpoints)
        return self._evaluate(0, final=True)

    def _evaluate(self, limit: int, final: bool = False) -> dict[str, Any]:
        engine = self.engine
        batches = data.heldout_batches(
            self.corpus,
            self.config.data,
            limit=limit,
            micro_batch=engine.train_micro_batch_size_per_gpu(),
            rank=self.rank,
            ranks=self.ranks,
        )
        result = {
            "kind": "evaluation",
            "step": engine.global_steps,
            "final": final,
            **evaluate(engine, batches, self.corpus),
        }
        self._record(result)
        if self.rank == 0:
            bits = "-" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.3f}"
            which = "all" if final or not limit else "some"
            tqdm.write(
                f"step {result['step']}: {bits} bits per byte on {which} held-out text, {result['tokens']:,} tokens"
            )
        return result

    def _seconds_so_far(self) -> float:
        """Training time of the steps that a resumed run does not do again; only rank 0 knows it."""
        if self.sink is None:
            return 0.0
        records = [record for record in read_json_lines(self.sink.path) if record["kind"] == "train"]
        return records[-1]["seconds"] if records else 0.0

    def _record(self, record: dict[str, Any]) -> None:
        if self.sink:
            self.sink.write(record)

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


def _check_layout(model: ModelConfig, ranks: int) -> None:
    if ranks % model.ep_size:
        raise ValueError(
            f"model.ep_size = {model.ep_size} does not divide the {ranks} ranks of this run: "
            f"launch a multiple of {model.ep_size} processes or set model.ep_size"
        )


def _together(work: Callable[[], Any], here: bool) -> list[Any]:
    """Do `work` on the ranks where `here` holds and wait for it; the results by rank.

    Raises:
        ValueError: on every rank, the first error that any of them met.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
    result, problem = None, None
    if here:
        try:
            result = work()
        except ValueError as error:
            problem = str(error)
        except Exception as error:  # whatever it is, the other ranks wait for this one
            problem = f"{type(error).__name__}: {error}"
    gathered = gather_objects((result, problem))
    for _, found in gathered:
        if found:
            raise ValueError(found)
    return [result for result, _ in gathered]


def _mean_over_ranks(losses: list[torch.Tensor]) -> float:
    mean = torch.stack(losses).double().mean()
    dist.all_reduce(mean)
    return float(mean / dist.get_world_size())
