"""Can every rank write the run's folder, is it one folder for all hosts, and is there room for the checkpoints?"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from ssr_deepspeed.preflight.equality import differences
from ssr_deepspeed.preflight.findings import Finding, judged
from ssr_deepspeed.preflight.job import Job
from ssr_deepspeed.pretrain.config import RunConfig
from ssr_deepspeed.pretrain.folder import BEGINNING, HOLDS_RUN, Existing, holds_run
from ssr_deepspeed.pretrain.manifest import PARTIAL, by_step
from ssr_deepspeed.pretrain.sizes import checkpoint_bytes

_GB = 10**9
# A network file system may show another host's new file only after its cache of the folder has aged.
_SECONDS = 5.0


def check_output(job: Job, folder: Path, existing: Existing) -> Finding:
    """Every rank can write the folder, sees what rank 0 wrote there, and would do the same with a run that it holds.

    Args:
        existing: what this rank is to do with that run.
    """
    told = differences(job, job.gather({BEGINNING: existing}))
    failures = [f"{sentence}: give the same flags to every host" for sentence in told]
    held = job.attempt(lambda: existing == "refuse" and holds_run(folder), here=job.rank == 0)[0]
    if held.result:
        return judged("output", "", failures=[*failures, HOLDS_RUN.format(folder=folder)])
    token = job.gather(uuid.uuid4().hex)[0]
    made = job.attempt(lambda: _missing_parents(folder), here=job.rank in job.leaders)
    written = job.attempt(lambda: _write(folder, token, job.rank))
    first = _file(folder, token, 0)
    seen = job.attempt(lambda: _appears(first, token) if written[0].problem is None else True)
    # Nobody removes a file before all have looked for it.
    job.attempt(lambda: _file(folder, token, job.rank).unlink(missing_ok=True))
    job.attempt(lambda: _remove_empty(made[job.rank].result or []), here=job.rank in job.leaders)
    failures += [f"{problem}: give --output a folder that it may write" for problem in job.problems(written)]
    blind = [rank for rank, (sees, _) in enumerate(seen) if not sees]
    if blind:
        failures.append(
            f"{job.name(blind)}: does not see the file that {job.name([0])} wrote to {folder}: "
            "put --output on a file system that all hosts share"
        )
    return judged("output", f"{folder} is written and seen by every rank", failures=failures)


def check_disk(job: Job, folder: Path, existing: Existing, config: RunConfig, vocabulary: int) -> Finding:
    """Room for the checkpoints that are kept, and for the next one, which is written before the oldest goes."""
    estimates = job.attempt(lambda: checkpoint_bytes(config, vocabulary), here=job.rank == 0)
    dropped = job.attempt(lambda: sum(map(_bytes_of, _dropped(folder / "checkpoints", existing))), here=job.rank == 0)
    outcomes = job.attempt(lambda: shutil.disk_usage(_existing(folder)).free)
    if failures := job.problems(estimates) + job.problems(dropped) + job.problems(outcomes):
        return judged("disk", "", failures=failures)
    one, free = estimates[0].result, [outcome.result + dropped[0].result for outcome in outcomes]
    needed = one * (config.keep_checkpoints + 1)
    what = f"{config.keep_checkpoints} checkpoints of {one / _GB:.3g} GB and one being written"
    short = [rank for rank, there in enumerate(free) if there < needed]
    failures = []
    if short:
        there = min(free[rank] for rank in short)
        failures.append(
            f"{job.name(short)}: {there / _GB:.3g} GB are free or hold checkpoints at {folder}, "
            f"{what} take {needed / _GB:.3g} GB: make room, choose another --output or lower keep_checkpoints"
        )
    return judged("disk", f"{min(free) / _GB:.3g} GB free, {what} take {needed / _GB:.3g} GB", failures=failures)


def _file(folder: Path, token: str, rank: int) -> Path:
    return folder / f".preflight_{token}_{rank}"


def _write(folder: Path, token: str, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _file(folder, token, rank).write_text(token, encoding="utf-8")


def _appears(file: Path, content: str) -> bool:
    """Whether a file that is written already comes into sight."""
    deadline = time.monotonic() + _SECONDS
    while True:
        os.listdir(file.parent)  # makes a network file system look again
        if file.is_file() and file.read_text(encoding="utf-8") == content:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _missing_parents(folder: Path) -> list[Path]:
    """Folders that writing will make, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        if not any(path.iterdir()):
            path.rmdir()


def _dropped(checkpoints: Path, existing: Existing) -> list[Path]:
    """What the run removes of those that are there: a resumed one, as it writes its own, all but the damaged."""
    if existing == "overwrite":
        return [checkpoints]
    return [*by_step(checkpoints), *checkpoints.glob(f"step_*{PARTIAL}")]


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
