"""Did every rank join, and has each a device of its own?"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.launcher.runner import fetch_hostfile

from ssr_deepspeed.preflight.findings import Finding, judged
from ssr_deepspeed.preflight.job import Job, Outcome, local_rank
from ssr_deepspeed.pretrain.ranks import expected_hosts, expected_ranks

_FEWER = "start the launcher on every host with the same rendezvous, or say --expect-ranks {ranks} if so few are meant"


def check_ranks(job: Job, expected: int | None, hostfile: Path | None) -> Finding:
    """As many ranks and hosts as the launcher, the scheduler, the hostfile and the user speak of.

    Args:
        expected: ranks that the user expects; what a scheduler or hostfile promises beyond them is no failure then.
        hostfile: of DeepSpeed's launcher, which trains on one host alone where it finds none.
    """
    promised = _promised(job, expected)
    failures = [
        f"{name} = {count}, but {job.ranks} joined: {_FEWER.format(ranks=job.ranks)}"
        for name, count in promised.items()
        if job.ranks < count or (job.ranks > count and name in ("WORLD_SIZE", "--expect-ranks"))
    ]
    hosts, (variable, wanted) = len(set(job.hosts)), job.gather(expected_hosts(os.environ))[0]
    if hosts < wanted and expected is None:
        failures.append(f"{variable} = {wanted}, but ranks run on {hosts}: {_FEWER.format(ranks=job.ranks)}")
    if hostfile is not None:
        failures += _read_hostfile(job, hostfile, expected)
    each = Counter(job.hosts)
    warnings = []
    if len(set(each.values())) > 1:
        counts = ", ".join(f"{host} {count}" for host, count in each.most_common())
        warnings.append(f"the hosts run unequal numbers of ranks ({counts}): give each as many")
    said = f", as expected by {' and '.join(promised)}" if promised else ""
    fine = f"{job.ranks} joined on {hosts} host{'s' if hosts > 1 else ''}{said}"
    return judged("ranks", fine, failures=failures, warnings=warnings)


def check_devices(job: Job) -> Finding:
    """On an accelerator each rank has a device of its own; on the CPU the backend is gloo."""
    outcomes = job.attempt(_device)
    backend = dist.get_backend()
    failures = [
        f"{problem}: start no more ranks on a host than it has devices"
        for problem in job.problems(outcomes) + shared_devices(job, outcomes)
    ]
    if get_accelerator().device_name() == "cpu":
        return judged("devices", f"the CPU, with {backend}")
    return judged("devices", f"one {get_accelerator().device_name()} device a rank, {backend}", failures=failures)


def shared_devices(job: Job, outcomes: list[Outcome]) -> list[str]:
    """A sentence for each device that several ranks of a host took."""
    holders: dict[Any, list[int]] = {}
    for rank, (device, _) in enumerate(outcomes):
        if device is not None:
            holders.setdefault((job.hosts[rank], device), []).append(rank)
    return [f"{job.name(ranks)} share the device {name}" for (_, name), ranks in holders.items() if len(ranks) > 1]


def _device() -> str | None:
    """What tells this rank's device from the host's others; None on the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return None
    if local_rank() >= accelerator.device_count():
        raise ValueError(f"LOCAL_RANK = {local_rank()}, but this process sees {accelerator.device_count()} devices")
    if accelerator.device_name() == "cuda":
        return str(getattr(torch.cuda.get_device_properties(local_rank()), "uuid", local_rank()))
    return str(local_rank())


def _promised(job: Job, expected: int | None) -> dict[str, int]:
    """Ranks that should be there, by who says so."""
    promised: dict[str, int] = {}
    for told in job.gather(expected_ranks(os.environ)):
        for name, count in told.items():
            if expected is None or name == "WORLD_SIZE":
                # Hosts may run unequal numbers of ranks: as many on each as on the smallest must be there.
                least_or_most = min if "*" in name else max
                promised[name] = least_or_most(promised.get(name, count), count)
    if expected is not None:
        promised["--expect-ranks"] = expected
    return promised


def _read_hostfile(job: Job, file: Path, expected: int | None) -> list[str]:
    """Only the host that starts the others needs to have the file."""
    outcomes = job.attempt(lambda: _slots(file))
    if problems := job.problems(outcomes):
        return [f"{problem}: write one line a host, as in `worker-0 slots=8`" for problem in problems]
    slots = next((outcome.result for outcome in outcomes if outcome.result), None)
    if slots is None:
        return [f"there is no hostfile {file}: DeepSpeed's launcher would train on one host alone; give its right path"]
    listed = sum(slots.values())
    if expected is None and listed > job.ranks:
        return [
            f"{file} lists {listed} slots on {len(slots)} hosts, but {job.ranks} ranks joined: "
            + _FEWER.format(ranks=job.ranks)
        ]
    return []


def _slots(file: Path) -> dict[str, int] | None:
    return dict(fetch_hostfile(str(file))) if file.is_file() else None
