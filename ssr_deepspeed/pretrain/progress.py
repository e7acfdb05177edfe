"""Throughput, and the line that shows it while a run trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from tqdm import tqdm

from ssr_deepspeed.monitor.metrics import finite
from ssr_deepspeed.pretrain.config import RunConfig


class Progress:
    """Throughput and the progress line: a live bar on a terminal, one line a record elsewhere."""

    def __init__(self, config: RunConfig, first_step: int, sequences_per_step: int, rank: int, elapsed: float) -> None:
        self.tokens_per_step = sequences_per_step * config.data.sequence_length
        self.steps, self.step, self.rank = config.steps, first_step, rank
        self._steps_at_record, self._paused = first_step, 0.0
        self._began = time.monotonic()
        self._elapsed = elapsed
        # tqdm hides the bar by itself where there is no terminal.
        self._bar = tqdm(total=config.steps, initial=first_step, unit="step", disable=None if rank == 0 else True)

    def advance(self) -> None:
        self.step += 1
        self._bar.update()

    def pause(self, work: Callable[[], Any]) -> None:
        """Do something that is not training, without counting its time."""
        began = time.monotonic()
        work()
        self._paused += time.monotonic() - began

    def record(self, engine: DeepSpeedEngine, loss: float) -> dict[str, Any]:
        """The record since the last one, also shown."""
        seconds = time.monotonic() - self._began - self._paused
        self._elapsed += seconds
        steps = self.step - self._steps_at_record
        norm = engine.get_global_grad_norm()
        record = {
            "kind": "train",
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": finite(loss),
            "learning_rate": float(engine.get_lr()[0]),
            "gradient_norm": None if norm is None else finite(norm),
            "tokens_per_second": round(steps * self.tokens_per_step / seconds, 1),
            "seconds": round(self._elapsed, 3),
        }
        self._began, self._paused, self._steps_at_record = time.monotonic(), 0.0, self.step
        if self.rank == 0:
            self._show(record, engine, seconds / steps)
        return record

    def _show(self, record: dict[str, Any], engine: DeepSpeedEngine, seconds_per_step: float) -> None:
        report = engine.ssr.report
        worst = (
            [layer["max_vio"] for layer in report["layers"].values() if layer["max_vio"] is not None] if report else []
        )
        figures = {
            "loss": "-" if record["loss"] is None else f"{record['loss']:.3f}",
            "lr": f"{record['learning_rate']:.1e}",
            "tok/s": f"{record['tokens_per_second']:.0f}",
            "imbalance": f"{max(worst):.2f}" if worst else "-",
        }
        self._bar.set_postfix(figures)
        if self._bar.disable:
            left = tqdm.format_interval(seconds_per_step * (self.steps - self.step))
            line = "  ".join(f"{name} {value}" for name, value in figures.items())
            print(f"step {self.step}/{self.steps}  {line}  ETA {left}", flush=True)

    def close(self) -> None:
        self._bar.close()
