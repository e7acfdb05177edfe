"""The ranks of a job, and how they tell each other what they found."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ssr_deepspeed.collectives import attempt, gather_objects

ADVICE = (
    "see that the hosts reach each other on every port, that GLOO_SOCKET_IFNAME (under NCCL also NCCL_SOCKET_IFNAME) "
    "names the network interface that joins them, and look at what NCCL_DEBUG=INFO prints"
)
# Ranks may read large data at unequal speed, and then wait for each other.
_PATIENCE = timedelta(minutes=10)
# Names of ranks in one sentence; a job may have thousands.
_NAMED = 8


class Outcome(NamedTuple):
    """What a rank's part of a check came to."""

    result: Any
    problem: str | None
    """The error that ended it, or None."""


@dataclass(frozen=True)
class Job:
    """All ranks of this job, as each of them sees it."""

    rank: int
    hosts: tuple[str, ...]
    """Host name of each rank."""
    control: Any
    """A gloo group of all ranks that carries what was found, so that another network may be at fault."""
    limit: timedelta
    """Longest time that one collective under test may take."""

    @property
    def ranks(self) -> int:
        return len(self.hosts)

    @property
    def leaders(self) -> list[int]:
        """The first rank of each host."""
        return sorted(self.hosts.index(host) for host in set(self.hosts))

    @property
    def device(self) -> torch.device:
        return torch.device(get_accelerator().current_device_name())

    def groups(self, *ranks: Sequence[int]) -> Any:
        """A group under test: this rank's of those that are given by their ranks, or one of all ranks."""
        # NCCL's watchdog ends the process at the group's timeout; `wait` must have spoken before.
        timeout = self.limit if dist.get_backend() == "gloo" else _PATIENCE
        every = ranks or (range(self.ranks),)
        return dist.new_subgroups_by_enumeration([list(each) for each in every], timeout=timeout)[0]

    def gather(self, item: Any) -> list[Any]:
        """`item` of every rank, in rank order, on every rank."""
        return gather_objects(item, self.control)

    def attempt(self, work: Callable[[], Any], here: bool = True) -> list[Outcome]:
        """Do `work` on the ranks where `here` holds; what came of it on every rank, whatever it raised."""
        own = attempt(work) if here else (None, None)
        return [Outcome(*each) for each in self.gather(own)]

    def problems(self, outcomes: list[Outcome]) -> list[str]:
        """One sentence for each problem, with the ranks that met it."""
        met: dict[str, list[int]] = {}
        for rank, outcome in enumerate(outcomes):
            if outcome.problem:
                met.setdefault(outcome.problem, []).append(rank)
        return [f"{self.name(ranks)}: {problem}" for problem, ranks in met.items()]

    def broken(self, outcomes: list[Outcome]) -> list[str]:
        """The problems of collectives, with what to look at when one did not come to its end."""
        return [f"{problem}; {ADVICE}" for problem in self.problems(outcomes)]

    def wait(self, work: Any) -> None:
        """Wait for a collective that was started with `async_op=True`.

        Raises:
            RuntimeError: it failed or took longer than the limit.
        """
        work.wait(self.limit)
        get_accelerator().synchronize()

    def name(self, ranks: Iterable[int]) -> str:
        """The ranks with their hosts, as in `rank 3 (b)` or `ranks 0-7 (a), 8 (b)`."""
        ranks = sorted(ranks)
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self.hosts[rank], []).append(rank)
        parts = [f"{spans(each)} ({host})" for host, each in hosts.items()]
        return f"rank{'s' if len(ranks) > 1 else ''} {shortened(parts)}"


def join(limit: timedelta) -> Job:
    """This rank's view of an initialised process group.

    Args:
        limit: of one collective under test.
    """
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    hosts = gather_objects(socket.gethostname(), control)
    return Job(dist.get_rank(), tuple(hosts), control, limit)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def spans(numbers: Iterable[int]) -> str:
    """Numbers in words, neighbours folded: `0-3, 6`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return shortened(["-".join(map(str, run)) for run in runs])


def shortened(parts: list[str]) -> str:
    """The first of many, joined by commas."""
    more = len(parts) - _NAMED
    return ", ".join(parts[:_NAMED]) + (f" and {more} more" if more > 0 else "")
