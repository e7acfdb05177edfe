"""Do the hosts agree on the time, and has each of them the memory that the run needs?"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ssr_deepspeed.preflight.findings import Finding, judged, ok
from ssr_deepspeed.preflight.job import Job
from ssr_deepspeed.pretrain.config import RunConfig
from ssr_deepspeed.pretrain.sizes import memory_of

_GIB = 2**30
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_TRIES = 5
SKEW = 1.0
"""Seconds between two hosts' clocks from which on their logs cannot be read together."""
FULL, TIGHT = 0.95, 0.80
"""Shares of the memory that are too much, and much."""


def check_clocks(job: Job) -> Finding:
    """The hosts' clocks against that of rank 0's host, by the quickest of several round trips."""
    leaders = job.leaders[1:]
    if not leaders:
        return ok("clocks", "one host")
    outcomes = job.attempt(lambda: _offsets(job, leaders))
    if failures := job.broken(outcomes):
        return judged("clocks", "", failures=failures)
    offsets = dict(zip(leaders, outcomes[0].result, strict=True))
    warnings = [
        f"the clock of {job.hosts[rank]} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of "
        f"{job.hosts[0]}: run NTP or chrony there, or logs and file times will mislead"
        for rank, offset in offsets.items()
        if abs(offset) > SKEW
    ]
    return judged(
        "clocks", f"within {max(map(abs, offsets.values())):.2g} s on {len(leaders) + 1} hosts", warnings=warnings
    )


def check_memory(job: Job, config: RunConfig, vocabulary: int) -> Finding:
    """The estimate of a rank's memory against what is free for it now."""
    estimates = job.attempt(lambda: memory_of(config, vocabulary, job.ranks), here=job.rank == 0)
    outcomes = job.attempt(lambda: _free_bytes(Counter(job.hosts)[job.hosts[job.rank]]))
    if failures := job.problems(estimates) + job.problems(outcomes):
        return judged("memory", "", failures=failures)
    parts, free = estimates[0].result, [outcome.result for outcome in outcomes]
    needed = sum(parts.values())
    largest = sorted(parts, key=lambda part: -parts[part])[:3]
    told = ", ".join(f"{part.replace('_', ' ')} {_gib(parts[part])}" for part in largest)
    what = f"about {_gib(needed)} a rank ({told})"

    def over(least: float, most: float) -> list[str]:
        ranks = [rank for rank, there in enumerate(free) if least * there < needed <= most * there]
        remedy = "lower train_micro_batch_size_per_gpu, recompute activations, raise the ZeRO stage or take more ranks"
        there = min((free[rank] for rank in ranks), default=0)
        return [f"{job.name(ranks)}: needs {what}, {_gib(there)} are free for it: {remedy}"] if ranks else []

    return judged(
        "memory",
        f"{what} of {_gib(min(free))} free for it",
        failures=over(FULL, float("inf")),
        warnings=over(TIGHT, FULL),
    )


def _offsets(job: Job, leaders: list[int]) -> list[float]:
    """On rank 0, seconds by which each leader's clock is ahead; the leaders answer in turn."""
    clock, offsets = torch.zeros(1, dtype=torch.float64), []
    for leader in leaders if job.rank == 0 else []:
        best = float("inf")
        offset = 0.0
        for _ in range(_TRIES):
            begun = time.time()
            dist.send(clock, leader, group=job.control)
            dist.recv(clock, leader, group=job.control)
            ended = time.time()
            if ended - begun < best:
                # The answer was written half a round trip ago, give or take that half.
                best, offset = ended - begun, float(clock) - (begun + ended) / 2
        offsets.append(offset)
    for _ in range(_TRIES if job.rank in leaders else 0):
        dist.recv(clock, 0, group=job.control)
        clock.fill_(time.time())
        dist.send(clock, 0, group=job.control)
    return offsets


def _free_bytes(ranks: int) -> float:
    """Memory that one of this host's ranks may still take, of its device or its share of the host's."""
    device = get_accelerator().device_name()
    if device == "cuda":
        # DeepSpeed's own `available_memory` counts what this process holds, and no other.
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    if device != "cpu":
        return float(get_accelerator().available_memory())
    return min(float(psutil.virtual_memory().available), *map(_left, _control_groups(_CGROUPS, _OWN_CGROUP))) / ranks


def _control_groups(root: Path, file: Path) -> list[Path]:
    """Folders of the control groups that limit this process's memory, which containers and Slurm set; root is one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for prefix, mount in (("memory:/", root / "memory"), ("0::/", root)):
        # Version 1 has a tree for memory alone, `4:memory:/path`; version 2 one for all, `0::/path`.
        own = next((line.partition(prefix)[2] for line in lines if prefix in line), None)
        if own is not None and mount.is_dir():
            return [mount / own, *(folder for folder in (mount / own).parents if folder.is_relative_to(mount))]
    return [root]


def _left(folder: Path) -> float:
    """Bytes that a control group may still take; what it holds of files that it has read can go."""
    for limit, used, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()).isdigit():
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return int(most) - int((folder / used).read_text()) + int(counts.get(inactive, 0))
    return float("inf")


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g} GiB"
