"""Throughput and where the time goes, and the line that shows it while a run trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from tqdm import tqdm

from ssr_deepspeed.hosts.scaler import loss_scale, scales_loss
from ssr_deepspeed.monitor.metrics import finite
from ssr_deepspeed.pretrain.config import RunConfig
from ssr_deepspeed.pretrain.devices import GateTimer, peak_flops
from ssr_deepspeed.pretrain.sizes import sizes_of

T = TypeVar("T")


class Progress:
    """Records of a run's training, and their line: a live bar on a terminal, one line a record elsewhere.

    Args:
        engine: that trains.
        config: of the run.
        vocabulary: tokens of its tokenizer.
        first_step: optimizer steps that were taken before.
        first_sample: sequences that all ranks took in them.
        elapsed: seconds that they took.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        config: RunConfig,
        vocabulary: int,
        first_step: int,
        first_sample: int,
        elapsed: float,
    ) -> None:
        self._engine, self._config, self._ranks = engine, config, dist.get_world_size()
        self.tokens_per_step = engine.train_batch_size() * config.data.sequence_length
        self.tokens = first_sample * config.data.sequence_length
        self.steps, self.step, self.rank = config.steps, first_step, dist.get_rank()
        self._flops_per_token = sizes_of(config, vocabulary).flops_per_token
        self._peak = config.peak_flops or peak_flops()
        self._gates = GateTimer(engine.gate_modules)
        self._timing, self._memory = False, 0.0
        self._steps_at_record, self._paused, self._waited = first_step, 0.0, 0.0
        self._began = time.monotonic()
        self._elapsed = self.seconds = elapsed
        # tqdm hides the bar by itself where there is no terminal.
        self._bar = tqdm(total=config.steps, initial=first_step, unit="step", disable=None if self.rank == 0 else True)

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch; the time it takes is waited for data. Of the step before a record, gates are timed too."""
        began = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - began
        if not self._timing and self.is_due(self.step + 1):
            self._timing = True
            self._gates.start()
        return batch

    def is_due(self, step: int) -> bool:
        """Whether a record follows that optimizer step."""
        return step % self._config.log_every == 0 or step == self.steps

    def advance(self) -> None:
        self.step += 1
        self.seconds = self._elapsed + time.monotonic() - self._began - self._paused
        self.tokens += self.tokens_per_step
        self._bar.update()

    def pause(self, work: Callable[[], Any]) -> None:
        """Do something that is not training, without counting its time."""
        began = time.monotonic()
        work()
        self._paused += time.monotonic() - began

    def record(self, losses: Sequence[Tensor]) -> tuple[float, dict[str, Any]]:
        """The record of the steps since the last one, also shown. All ranks call it together.

        Args:
            losses: of this rank's micro-batches since the last record, 0-dim, on the engine's device.

        Returns:
            Their mean over all ranks, which is the same on every rank, and the record. Times are this rank's but
            for the wait for data and the memory, of the rank that has most of each, and the gates' share, a mean. Where
            ranks meet within a gate, the wait for the slowest counts there.
        """
        share = self._gates.stop()
        own = [self._waited, get_accelerator().max_memory_allocated(), share or 0.0]
        loss, waited, memory, gates = _over_ranks(losses, own, self._engine.device)
        # The ranks have met and the device has finished.
        seconds = time.monotonic() - self._began - self._paused
        self._elapsed += seconds
        self._memory = max(self._memory, memory)
        record = self._training(loss) | self._speed(seconds)
        record |= {
            "peak_memory_bytes": int(memory),
            "data_wait_share": round(min(waited / seconds, 1.0), 4),
            "gate_time_share": None if share is None else round(gates, 4),
        }
        if self.rank == 0:
            self._show(record)
        self._timing, self._waited, self._paused, self._steps_at_record = False, 0.0, 0.0, self.step
        self._began = time.monotonic()
        return loss, record

    def _training(self, loss: float) -> dict[str, Any]:
        """What a run that was resumed records as one that was not."""
        engine, norm = self._engine, self._engine.get_global_grad_norm()
        scale = {"loss_scale": loss_scale(engine)} if scales_loss(engine) else {}
        return {
            "kind": "train",
            "step": self.step,
            "tokens": self.tokens,
            "loss": finite(loss),
            "learning_rate": float(engine.get_lr()[0]),
            "gradient_norm": None if norm is None else finite(norm),
            "skipped_steps": engine.skipped_steps,
            **scale,
        }

    def _speed(self, seconds: float) -> dict[str, Any]:
        step_seconds = seconds / (self.step - self._steps_at_record)
        rate = self.tokens_per_step / step_seconds
        flops = rate * self._flops_per_token
        return {
            "seconds": round(self._elapsed, 3),
            "step_seconds": round(step_seconds, 6),
            "eta_seconds": round(step_seconds * (self.steps - self.step), 1),
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_per_device": round(rate / self._ranks, 1),
            "model_flops_per_second": round(flops),
            "mfu": round(flops / (self._ranks * self._peak), 4) if self._peak else None,
        }

    def _show(self, record: dict[str, Any]) -> None:
        report = self._engine.ssr.report
        worst = (
            [layer["max_vio"] for layer in report["layers"].values() if layer["max_vio"] is not None] if report else []
        )
        figures = {
            "loss": "-" if record["loss"] is None else f"{record['loss']:.3f}",
            "lr": f"{record['learning_rate']:.1e}",
            "tok/s": f"{record['tokens_per_second']:.0f}",
            "imbalance": f"{max(worst):.2f}" if worst else "-",
        }
        if record["mfu"] is not None:
            figures["mfu"] = f"{record['mfu']:.1%}"
        self._bar.set_postfix(figures)
        if self._bar.disable:
            left = tqdm.format_interval(record["eta_seconds"])
            line = "  ".join(f"{name} {value}" for name, value in figures.items())
            print(f"step {self.step}/{self.steps}  {line}  ETA {left}", flush=True)

    def close(self) -> None:
        """End the line, with the sum of the run."""
        self._bar.close()
        if self.rank == 0 and self._memory:
            tokens, seconds = self.tokens, self._elapsed
            print(
                f"trained on {tokens:,} tokens in {tqdm.format_interval(seconds)}: {tokens / seconds:,.0f} tokens a "
                f"second, at most {self._memory / 2**30:.2f} GiB of memory a rank",
                flush=True,
            )


def _over_ranks(losses: Sequence[Tensor], own: Sequence[float], device: torch.device) -> list[float]:
    """In one collective the mean of all ranks' losses, the longest wait, the largest memory, the mean gates' share."""
    mean = torch.stack(list(losses)).double().mean().reshape(1)
    mine = torch.cat([mean, torch.tensor(own, dtype=torch.float64, device=device)])
    all_R = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_R, mine)
    loss_R, waited_R, memory_R, gates_R = torch.stack(all_R).cpu().unbind(1)
    return [float(one) for one in (loss_R.mean(), waited_R.max(), memory_R.max(), gates_R.mean())]
