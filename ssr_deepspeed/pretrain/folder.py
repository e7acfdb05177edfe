"""The folder of a run: one process writes to it, and a resumed run is the one that it holds.

claim      locks it, and refuses what may not be done there
begin      when it is known which checkpoint the run goes on from, removes what it will do again
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Literal, TextIO

from ssr_deepspeed.files import replace_text
from ssr_deepspeed.monitor.records import METRICS
from ssr_deepspeed.monitor.sinks import keep_records
from ssr_deepspeed.pretrain.checkpoint import remove_partial
from ssr_deepspeed.pretrain.manifest import Manifest, by_step, set_aside
from ssr_deepspeed.pretrain.signals import say

Existing = Literal["refuse", "resume", "weights", "overwrite"]
BEGINNING = "what to do with a run that --output holds (--resume, --overwrite)"
HOLDS_RUN = "{folder} holds a run already: --resume it, --overwrite it or name another --output"
LEASE = 120.0
"""Seconds after which file servers let go of what a lost host had locked; NFS 4's usual lease is 90."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def claim(folder: Path, settings: dict[str, Any], existing: Existing) -> TextIO:
    """Make the folder this run's; the lock on it, held as long as the file is open.

    Args:
        folder: of the run; made where it is missing.
        settings: of the run, as in its `config.json`.
        existing: what to do with a run that the folder holds.

    Raises:
        ValueError: another process writes there, or there is a run that may not be touched or is not this one.
    """
    file = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("a+")
    try:
        _lock(lock, folder)
    except BlockingIOError:
        raise ValueError(
            f"another process is still writing to {folder}{_holder(lock)}: wait for it or end it; if its host is down, "
            f"remove {lock.name}"
        ) from None
    except OSError as error:
        say(f"WARNING: {folder} cannot be locked ({error.strerror}): see that no other run writes there")
    if existing == "overwrite":
        _clear(folder)
    if holds_run(folder):
        if existing == "refuse":
            raise ValueError(HOLDS_RUN.format(folder=folder))
        _check_same(json.loads(file.read_text(encoding="utf-8")), settings, file, existing == "weights")
    return lock


def holds_run(folder: Path) -> bool:
    """Whether a run has recorded or saved anything there."""
    records = folder / METRICS  # empty, it is of a run that never began
    return (records.exists() and records.stat().st_size > 0) or bool(by_step(folder / "checkpoints"))


def _lock(lock: TextIO, folder: Path) -> None:
    """Lock it, and leave a note of who has. The system lets go when a process ends, however it ends.

    A file server does so for a host that is lost only after a while: so another host's lock is waited for.
    """
    # Hosts may share a name, as a pod and the one that replaces it do.
    machine = f"boot {_BOOT.read_text().strip()}" if _BOOT.exists() else f"host {socket.gethostname()}"
    deadline, told = time.monotonic() + LEASE, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read()
            if not holder or machine in holder or time.monotonic() > deadline:
                raise
            if not told:
                say(f"{folder} is held by another process{_holder(lock)}: waiting for it, at most {LEASE:g} s")
            told = True
            time.sleep(0.5)
    lock.truncate(0)
    lock.write(f"host {socket.gethostname()}, process {os.getpid()}\n{machine}")
    lock.flush()


def _holder(lock: TextIO) -> str:
    lock.seek(0)
    found = lock.readline().strip()
    return f" ({found})" if found else ""


def begin(folder: Path, settings: dict[str, Any], start: Manifest | None) -> None:
    """Write `config.json`, and remove records and checkpoints of steps that the run will do again.

    Args:
        start: the checkpoint that the run goes on from; None where it begins.
    """
    replace_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    checkpoints = folder / "checkpoints"
    remove_partial(checkpoints)
    if start is not None:
        set_aside(checkpoints, start)
    step, owes = (start.step, start.owes_evaluation) if start else (0, False)
    # Before anyone opens the file to append: this replaces it.
    keep_records(
        folder / METRICS,
        lambda record: (
            record["step"] <= step
            and not record.get("final")
            and not (owes and record["kind"] == "evaluation" and record["step"] == step)
        ),
    )


def _check_same(old: dict[str, Any], new: dict[str, Any], file: Path, other_layout: bool) -> None:
    """A resumed run may be longer and log otherwise, but not be another model on other data.

    `ep_size` is compared with the checkpoint's own. Batches may differ at another layout: samples are counted.
    """
    # Where the text lies may change: its fingerprint tells that it is the same.
    free = ("source", "cache", "prepared", "workers", "ep_size")
    for section in ("model", "data"):
        for key, value in new[section].items():
            there = old[section].get(key)
            if key not in free and there not in (None, value):  # None: a version that did not know the key
                raise ValueError(f"cannot resume: {section}.{key} is {there!r} in {file} and {value!r} now")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        there, now = old["deepspeed"].get(key), new["deepspeed"].get(key)
        if there != now and not other_layout:
            raise ValueError(f"cannot resume: deepspeed.{key} is {there!r} in {file} and {now!r} now")
    if old["seed"] != new["seed"]:
        raise ValueError(f"cannot resume: seed is {old['seed']} in {file} and {new['seed']} now")


def _clear(folder: Path) -> None:
    """Remove an earlier run from its folder: only what a run writes."""
    if not (folder / "config.json").exists():
        return
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    # Last what tells that a run was here: killed before, this begins anew.
    for name in (METRICS, "report.html", "loss.png", "load.png", "config.json"):
        (folder / name).unlink(missing_ok=True)
