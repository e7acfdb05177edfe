"""Checkpoints that a killed process cannot spoil, and from which a run resumes bit for bit.

DeepSpeed writes the engine's state. Beside it go each rank's random states. Only when every rank has
written everything does rank 0 replace the file `latest` in one step, so it never names a
half-written checkpoint.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import numpy
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from ssr_deepspeed.collectives import gather_objects
from ssr_deepspeed.files import replace_text

_LATEST = "latest"


def save(engine: DeepSpeedEngine, folder: Path, keep: int) -> None:
    """Write a checkpoint of the current step, on all ranks together, and drop all but the newest `keep`."""
    step = engine.global_steps
    tag = _tag(step)
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    torch.save(_random_states(), folder / tag / _random_file(dist.get_rank()))
    dist.barrier()
    if dist.get_rank() == 0:
        replace_text(folder / _LATEST, tag)
        for old in _by_step(folder)[:-keep]:
            if old.name != tag:
                shutil.rmtree(old)
    dist.barrier()


def load(engine: DeepSpeedEngine, folder: Path) -> int:
    """Restore the latest checkpoint; the number of optimizer steps taken, 0 when there is none.

    All ranks decide together by what each of them sees on disk.

    Raises:
        ValueError: on every rank alike, when the checkpoint was written by another number of ranks
            or not every rank sees it.
    """
    step, written = gather_objects((latest_step(folder), _ranks_of(folder)))[0]
    if step == 0:
        return 0
    home, rank, ranks = folder / _tag(step), dist.get_rank(), dist.get_world_size()
    if written != ranks:
        raise ValueError(
            f"the checkpoint {home} was written by {written} ranks; this run has {ranks}: "
            "resume with as many, or start a new run"
        )
    mine = home / _random_file(rank)
    blind = [number for number, sees in enumerate(gather_objects(mine.is_file())) if not sees]
    if blind:
        raise ValueError(
            f"ranks {blind} do not see their part of the checkpoint {home}: put --output on a shared file system"
        )
    loaded, _ = engine.load_checkpoint(str(folder), tag=_tag(step))
    if loaded is None:
        raise ValueError(f"DeepSpeed could not load the checkpoint {home}")
    _restore(torch.load(mine, weights_only=False))
    return engine.global_steps


def latest_step(folder: Path) -> int:
    """The optimizer step of the latest checkpoint, 0 when there is none."""
    latest = folder / _LATEST
    return _step_of(latest.read_text(encoding="utf-8").strip()) if latest.is_file() else 0


def _ranks_of(folder: Path) -> int:
    return len(list((folder / _tag(latest_step(folder))).glob(_random_file("*"))))


def _random_file(rank: int | str) -> str:
    return f"random_rank_{rank}.pt"


def _tag(step: int) -> str:
    return f"step_{step}"


def _step_of(tag: str) -> int:
    return int(tag.removeprefix("step_"))


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), key=lambda path: _step_of(path.name))


def _random_states() -> dict[str, Any]:
    accelerator = get_accelerator()
    device = None if accelerator.device_name() == "cpu" else accelerator.get_rng_state()
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": device,
    }


def _restore(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        get_accelerator().set_rng_state(states["device"])
