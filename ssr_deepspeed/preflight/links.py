"""How fast each pair of ranks exchanges a message, and which rank or link is slower than the others."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ssr_deepspeed.preflight.findings import Finding, judged, ok
from ssr_deepspeed.preflight.job import Job, shortened

_MIB = 2**20
_ROUNDS = 15
"""Partners of a rank: enough to tell the rank from the link, and a few seconds on any number of ranks."""
_REPEATS = 5
SLOW = 2.0
"""A rank or link is slow that takes this many times as long as most of its kind."""


def check_links(job: Job) -> Finding:
    """Pairs of ranks exchange messages, all of a round at the same time and each with nobody else."""
    if job.ranks < 3:
        return ok("links", "nothing to compare with fewer than 3 ranks")
    group = job.groups()
    outcomes = job.exchange(lambda: _times(job, group))
    if failures := job.broken(outcomes):
        return judged("links", "", failures=failures)
    pairs: dict[tuple[int, int], float] = {}
    for rank, (times, _) in enumerate(outcomes):
        for partner, seconds in times.items():
            pair = min(rank, partner), max(rank, partner)
            pairs[pair] = max(pairs.get(pair, 0.0), seconds)
    usual = sorted(pairs.values())[(len(pairs) - 1) // 2]
    fine = (
        f"{len(pairs)} pairs exchange {_size() // _MIB} MiB in {usual * 1e3:.3g} ms, none much slower than the others"
    )
    return judged("links", fine, warnings=slow_links(job, pairs, timing_noise()))


def timing_noise() -> float:
    """Differences of times below these seconds are the scheduler's and the clock's."""
    return 5e-3 if get_accelerator().device_name() == "cpu" else 1e-4


def slow_links(job: Job, pairs: dict[tuple[int, int], float], noise: float) -> list[str]:
    """Sentences on the slow ranks, and on slow links between ranks that are not.

    Pairs within a host are compared with one another, and so are those between hosts. Of each kind the quickest
    quarter says what is usual, since one slow rank of three slows two pairs of three. A rank is slow when half of its
    pairs of a kind are, and more than one.

    Args:
        pairs: seconds of an exchange by the pair's ranks, the lower first.
        noise: seconds above the usual that count for nothing.
    """
    kinds: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}
    for (a, b), seconds in pairs.items():
        kinds[job.hosts[a] == job.hosts[b]][a, b] = seconds
    slow_ranks: dict[int, float] = {}
    slow_pairs: dict[tuple[int, int], float] = {}
    for kind in filter(None, kinds.values()):
        usual = sorted(kind.values())[len(kind) // 4]
        bound = max(SLOW * usual, usual + noise)
        slow_pairs.update({pair: seconds / usual for pair, seconds in kind.items() if seconds > bound})
        for rank in {rank for pair in kind for rank in pair}:
            own = sorted(seconds for pair, seconds in kind.items() if rank in pair)
            middle = own[(len(own) - 1) // 2]
            if len(own) > 1 and middle > bound:
                slow_ranks[rank] = max(slow_ranks.get(rank, 0.0), middle / usual)
    warnings = [
        f"rank {rank} ({job.hosts[rank]}) takes {times:.1f} times as long as most to exchange a message: look at that "
        "host's network interface and load, or leave it out"
        for rank, times in sorted(slow_ranks.items(), key=lambda item: -item[1])
    ]
    links = [
        f"rank {a} ({job.hosts[a]}) and rank {b} ({job.hosts[b]}), {times:.1f} times"
        for (a, b), times in sorted(slow_pairs.items(), key=lambda item: -item[1])
        if not {a, b} & slow_ranks.keys()
    ]
    if links:
        warnings.append(f"slow links, by the times that most of their kind take: {shortened(links)}")
    return warnings


def tournament(ranks: int, most: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every rank meets another one, each pair at most once; with an odd number one rank rests.

    Args:
        most: rounds to take, evenly spread over all of them.
    """
    places = ranks + ranks % 2
    rounds = min(most, places - 1)
    chosen = [number * (places - 1) // rounds for number in range(rounds)]
    return [[pair for pair in _round(places, number) if max(pair) < ranks] for number in chosen]


def _round(places: int, number: int) -> list[tuple[int, int]]:
    """The circle method: the last place stays, the others turn by one each round."""
    turning = places - 1
    pairs = [(number, turning)]
    for step in range(1, places // 2):
        pairs.append(tuple(sorted(((number + step) % turning, (number - step) % turning))))  # type: ignore[arg-type]
    return pairs


def _times(job: Job, group: Any) -> dict[int, float]:
    """Least seconds of an exchange with each of this rank's partners."""
    sent = torch.zeros(_size(), dtype=torch.uint8, device=job.device)
    received, times = torch.empty_like(sent), {}
    # Where a rank rests, NCCL would wait for it: a group's first operation is everyone's.
    job.wait(dist.all_reduce(sent[:1], group=group, async_op=True))
    for pairs in tournament(job.ranks, _ROUNDS):
        partner = next((sum(pair) - job.rank for pair in pairs if job.rank in pair), None)
        if partner is None:
            continue
        # Wait for the partner to be here, so that its earlier rounds do not count as this one.
        _exchange(job, group, partner, sent[:1], received[:1])
        best = float("inf")
        for _ in range(_REPEATS):
            begun = time.perf_counter()
            _exchange(job, group, partner, sent, received)
            best = min(best, time.perf_counter() - begun)
        times[partner] = best
    return times


def _exchange(job: Job, group: Any, partner: int, sent: Tensor, received: Tensor) -> None:
    operations = [dist.P2POp(dist.isend, sent, partner, group), dist.P2POp(dist.irecv, received, partner, group)]
    for work in dist.batch_isend_irecv(operations):
        job.wait(work)


def _size() -> int:
    """Bytes of a message."""
    return _MIB if get_accelerator().device_name() == "cpu" else 4 * _MIB
