"""Checkpoints that a killed process or a full disk cannot spoil, and from which a run resumes bit for bit.

DeepSpeed writes the engine's state: weights, optimizer, schedule, loss scale, steps, and through the plugin what
rules and load monitor keep. Beside it goes what each rank has of its own: random states, the losses since the last
record, and torch's loss scaler, which DeepSpeed uses for fp16 by autocast and does not save. Everything is written
into `step_N.partial` and waited for until the disk has it. When all ranks are done, rank 0 adds the manifest, renames
the folder to `step_N` and replaces `latest`, in this order, so that a run killed anywhere finds the checkpoint before
or this one. Until then the earlier ones stay: there must be room for one more than are kept.
"""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import deepspeed.comm as dist
import numpy
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from ssr_deepspeed.collectives import gather_objects
from ssr_deepspeed.files import replace_text, sync_folder
from ssr_deepspeed.hosts.scaler import torch_scaler
from ssr_deepspeed.pretrain.manifest import LATEST, PARTIAL, Manifest, by_step, tag
from ssr_deepspeed.pretrain.signals import say


class NotSavedError(RuntimeError):
    """A checkpoint without which the run may not end could not be written."""


class Checkpoints:
    """The checkpoints of a run, written by all ranks together.

    Args:
        engine: whose state they hold. Its writer of files is replaced by one that reports what failed.
        folder: `checkpoints/` of the run.
        keep: how many of the newest stay.
        ep_size: of the model.

    Raises:
        ValueError: DeepSpeed is configured to write checkpoints its own way.
    """

    def __init__(self, engine: DeepSpeedEngine, folder: Path, keep: int, ep_size: int) -> None:
        if type(engine.checkpoint_engine) is not TorchCheckpointEngine:
            raise ValueError(
                f"DeepSpeed is configured to write checkpoints with {type(engine.checkpoint_engine).__name__}, which "
                "may end after it has returned; allowed: its default. Remove deepspeed.checkpoint.writer and "
                "deepspeed.datastates_ckpt"
            )
        self.engine, self.folder, self.keep, self.ep_size = engine, folder, keep, ep_size
        self.newest: int | None = None
        """Step of the last checkpoint that this run has written or begun from."""
        self._writer = engine.checkpoint_engine = _Writer(engine._config)
        # It copies scripts beside the checkpoints, on rank 0 alone.
        engine._copy_recovery_script = self._writer.guarded(engine._copy_recovery_script)

    def save(
        self,
        samples: int,
        seconds: float,
        losses: list[torch.Tensor],
        owes_evaluation: bool,
        written: Callable[[], None] = lambda: None,
    ) -> str | None:
        """Write a checkpoint of the current step.

        A write that fails, on any rank, leaves the earlier checkpoints as they were. No rank waits for one that failed.

        Args:
            samples: sequences consumed so far.
            seconds: of training so far.
            losses: of this rank's micro-batches since the last record, scalars.
            owes_evaluation: the step's evaluation is still to be done.
            written: called when this rank's files are on the disk, and others may still write.

        Returns:
            None, or why it could not be written, the same on every rank.
        """
        step, rank = self.engine.global_steps, dist.get_rank()
        partial = self.folder / (tag(step) + PARTIAL)
        if rank == 0:  # nobody writes before DeepSpeed's first barrier
            shutil.rmtree(partial, ignore_errors=True)
        self._writer.begin()
        self.engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
        own = {"random": _random_states(), "losses": torch.stack(losses).cpu() if losses else None}
        scaler = torch_scaler(self.engine)
        if scaler is not None:
            own["scaler"] = scaler.state_dict()
        self._writer.save(own, str(partial / _own_file(rank)))
        written()
        found = gather_objects((self._writer.problem, self._writer.files))
        problem = next((f"rank {number}, {why}" for number, (why, _) in enumerate(found) if why), None)
        if rank == 0:
            manifest = Manifest(
                step=step,
                samples=samples,
                seconds=round(seconds, 3),
                ranks=dist.get_world_size(),
                ep_size=self.ep_size,
                owes_evaluation=owes_evaluation,
                files={name: entry for _, files in found for name, entry in files.items()},
            )
            problem = problem or _problem_of(lambda: self._publish(partial, manifest))
            if problem:
                shutil.rmtree(partial, ignore_errors=True)
        problem = gather_objects(problem)[0]
        if problem is None:
            self.newest = step
            return None
        return f"the checkpoint of step {step} could not be written ({problem}); the earlier ones are as they were"

    def _publish(self, partial: Path, manifest: Manifest) -> None:
        there = {file.name: file.stat().st_size for file in partial.iterdir()}
        hidden = [name for name, (size, _) in manifest.files.items() if there.get(name) != size]
        if hidden:
            raise OSError(f"rank 0 does not see {hidden[0]} of another rank: put --output on a shared file system")
        manifest.write(partial)
        target = self.folder / manifest.tag
        if target.exists():
            _remove(target)
        partial.rename(target)
        # From here on it is a checkpoint, whatever else fails.
        problem = _problem_of(lambda: self._tidy(target))
        if problem:
            say(f"WARNING: the checkpoint of step {manifest.step} is whole, but beside it: {problem}")

    def _tidy(self, target: Path) -> None:
        sync_folder(self.folder)
        replace_text(self.folder / LATEST, target.name, durable=True)
        for old in by_step(self.folder)[: -self.keep]:
            if old != target:
                _remove(old)

    def load(self, manifest: Manifest) -> list[torch.Tensor]:
        """Restore a whole checkpoint; this rank's losses since the last record.

        Where it was written by another number of ranks or with another `ep_size`, the weights and the rules' state are
        taken over, step and schedule too, while the optimizer's moments and random states begin anew.

        Raises:
            ValueError: on every rank alike, when DeepSpeed does not load it.
        """
        engine, same = self.engine, self.fits(manifest)
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=manifest.tag, load_optimizer_states=same)
        if loaded is None:
            raise ValueError(f"DeepSpeed could not load the checkpoint {self.folder / manifest.tag}")
        self.newest = manifest.step
        if not same:
            self._begin_moments()
            torch.manual_seed(torch.initial_seed() + manifest.step * dist.get_world_size())
            return []
        own = torch.load(self.folder / manifest.tag / _own_file(dist.get_rank()), weights_only=False)
        _restore(own["random"])
        scaler = torch_scaler(engine)
        if scaler is not None and "scaler" in own:  # older checkpoints have none
            scaler.load_state_dict(own["scaler"])
        return [] if own["losses"] is None else list(own["losses"].to(engine.device))

    def _begin_moments(self) -> None:
        """What loading an optimizer's state would have done beside its moments."""
        engine = self.engine
        if not engine.zero_optimization() and hasattr(engine.optimizer, "refresh_fp32_params"):
            engine.optimizer.refresh_fp32_params()  # from the weights; ZeRO does it by itself
        if engine.lr_scheduler is not None:  # the learning rate of the next step stands in the optimizer
            engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)

    def fits(self, manifest: Manifest) -> bool:
        """Whether it was written by as many ranks and with the same `ep_size`."""
        return (manifest.ranks, manifest.ep_size) == (dist.get_world_size(), self.ep_size)


class _Writer(TorchCheckpointEngine):
    """Writes DeepSpeed's files, waits for the disk, and remembers what failed in place of raising it.

    Between its writes DeepSpeed waits for all ranks: one that raised would leave the others waiting.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.begin()

    def begin(self) -> None:
        self.problem: str | None = None
        self.files: dict[str, list[int]] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.problem = self.problem or _problem_of(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        if self.problem is None:
            self.problem = _problem_of(lambda: self._save(state_dict, Path(path)))

    def _save(self, state: Any, path: Path) -> None:
        with path.open("wb") as file:
            stream: Any = _Summed(file)
            try:
                torch.save(state, stream, _use_new_zipfile_serialization=self.zipfile_serialization)
            except RuntimeError as error:
                raise stream.error or error from None
            file.flush()
            os.fsync(file.fileno())
        self.files[path.name] = [stream.size, stream.checksum]

    def guarded(self, work: Callable[..., None]) -> Callable[..., None]:
        """`work`, whose failure is remembered too."""

        def run(*arguments: Any) -> None:
            self.problem = self.problem or _problem_of(lambda: work(*arguments))

        return run


class _Summed:
    """A file being written, its size and CRC-32; `torch.save` hides the error that stopped it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size, self.checksum = 0, 0
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            count = self._file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.size += count
        self.checksum = zlib.crc32(content, self.checksum)
        return count

    def flush(self) -> None:
        self._file.flush()


def _problem_of(work: Callable[[], None]) -> str | None:
    """Do something; why it failed, if it did."""
    try:
        work()
    except OSError as error:
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except Exception as error:  # whatever it is, the other ranks wait for this one
        return f"{type(error).__name__}: {error}"
    return None


def _remove(folder: Path) -> None:
    """Remove a checkpoint; what a kill leaves of it is not taken for one."""
    doomed = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_partial(folder: Path) -> list[str]:
    """Remove what a killed process has left half-written or half-removed; the names."""
    found = sorted(folder.glob(f"step_*{PARTIAL}"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


def _own_file(rank: int) -> str:
    return f"rank_{rank}.pt"


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
