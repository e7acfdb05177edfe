"""The ranks of a job, and how they tell each other what they found."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ssr_deepspeed.collectives import attempt, gather_objects
from ssr_deepspeed.pretrain.watch import at_the_latest

ADVICE = (
    "see that the hosts reach each other on every port, that GLOO_SOCKET_IFNAME (under NCCL also NCCL_SOCKET_IFNAME) "
    "names the network interface that joins them, and look at what NCCL_DEBUG=INFO prints"
)
# Ranks may read large data at unequal speed, and then wait for each other.
_PATIENCE = timedelta(minutes=10)
MEETING = timedelta(minutes=5)
"""Longest time until ranks have met, or until a few collectives are done that none of them waits for too long.

NCCL connects in a group's first collective, and no timeout of its own ends that.
"""
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

    def exchange(self, work: Callable[[], Any]) -> list[Outcome]:
        """As `attempt`, for collectives under test. Where one does not even begin, the process ends with a sentence."""
        with met_within(MEETING):
            own = attempt(work)
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
        if not get_accelerator().use_host_timers():
            # NCCL's own wait with a limit looks once a millisecond, in which these networks carry tens of megabytes.
            deadline = time.monotonic() + self.limit.total_seconds()
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"a collective did not end in {self.limit.total_seconds():g} s")
            work.wait()
            get_accelerator().synchronize()
        else:
            work.wait(self.limit)

    def name(self, ranks: Iterable[int]) -> str:
        """The ranks with their hosts, as in `rank 3 (b)` or `ranks 0-7 (a), 8 (b)`."""
        ranks = sorted(ranks)
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self.hosts[rank], []).append(rank)
        parts = [f"{spans(each)} ({host})" for host, each in hosts.items()]
        return f"rank{'s' if len(ranks) > 1 else ''} {shortened(parts)}"


def met_within(limit: timedelta) -> AbstractContextManager[None]:
    """End this process, with one sentence, if what is inside takes longer."""
    seconds = limit.total_seconds()

    def end() -> None:
        where = f"rank {os.environ.get('RANK', 0)} ({socket.gethostname()})"
        print(f"ssr-preflight: {where}: the ranks have not met in {seconds:g} s; {ADVICE}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    return at_the_latest(seconds, end)


def meet(limit: timedelta) -> Job:
    """Make the process group, and join it. Under NCCL nothing is connected yet, so that faults can be told first.

    Args:
        limit: of one collective under test.
    """
    with met_within(MEETING):
        dist.init_process_group(get_accelerator().communication_backend_name(), timeout=MEETING)
        deepspeed.init_distributed()  # takes over what there is
        return join(limit)


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
