"""Do collectives carry every element to its place, and how fast?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ssr_deepspeed.preflight.findings import Finding, judged
from ssr_deepspeed.preflight.job import Job
from ssr_deepspeed.preflight.layout import Layout
from ssr_deepspeed.preflight.links import SLOW, timing_noise

_MIB = 2**20
# Timed collectives of one kind stop when they have taken this long together.
_SECONDS = 1.0


def check_all_reduce(job: Job, timed: bool) -> Finding:
    """Sums over all ranks are exact, in the dtypes and sizes of training, with their bandwidth.

    Args:
        timed: measure the bandwidth too.
    """
    group = job.groups()
    outcomes = job.exchange(lambda: _wrong_sums(job, group))
    failures = job.broken(outcomes) or [
        f"rank {rank} ({job.hosts[rank]}) got {sum(wrong.values())} wrong sums, of elements that {job.name(wrong)} "
        "filled: a faulty link, device or library there; leave that host out"
        for rank, (wrong, _) in enumerate(outcomes)
        if wrong
    ]
    fine = f"exact over {job.ranks} ranks in float32 and bfloat16"
    if timed and job.ranks > 1 and not failures:
        size = (16 if get_accelerator().device_name() == "cpu" else 256) * _MIB
        tensor = torch.zeros(size // 4, device=job.device)
        seconds, failures = _seconds(job, lambda: dist.all_reduce(tensor, group=group, async_op=True))
        if seconds:
            # Each of P ranks sends and receives 2 (P - 1) / P of the elements, however they are summed.
            moved = 2 * (job.ranks - 1) / job.ranks * size
            fine += f"; {_rate(moved / max(seconds))} a rank with {size // _MIB} MiB"
    return judged("all-reduce", fine, failures=failures)


def check_all_to_all(job: Job, layout: Layout, elements: int, dtype: torch.dtype, timed: bool) -> Finding:
    """Each element of the experts' dispatch arrives where it is sent, with its bandwidth.

    Args:
        elements: that a rank dispatches in one MoE layer of the run.
        dtype: of the run's activations.
        timed: measure the bandwidth too, at that size, and name the slow groups.
    """
    if layout.ep_size == 1:
        return judged("all-to-all", "none: every rank holds all experts (ep_size = 1)")
    group = job.groups(*layout.ep_groups)
    size = _block(job, elements, dtype, timed, layout.ep_size)
    outcomes = job.exchange(lambda: _misplaced(job, group, size, dtype))
    failures = job.broken(outcomes) or [
        f"rank {rank} ({job.hosts[rank]}) received {sum(wrong.values())} wrong elements "
        f"from {job.name(wrong)}: a faulty link, device or library there; leave that host out"
        for rank, (wrong, _) in enumerate(outcomes)
        if wrong
    ]
    moved = size * dtype.itemsize * layout.ep_size
    fine = f"exact among each {layout.ep_size} ranks with {moved / _MIB:.3g} MiB a rank"
    if not timed or failures:
        return judged("all-to-all", fine, failures=failures)
    sent = torch.zeros(size * layout.ep_size, dtype=dtype, device=job.device)
    received = torch.empty_like(sent)
    seconds, failures = _seconds(job, lambda: dist.all_to_all_single(received, sent, group=group, async_op=True))
    if failures:
        return judged("all-to-all", fine, failures=failures)
    taken = [max(seconds[rank] for rank in ranks) for ranks in layout.ep_groups]
    crossing = moved * (layout.ep_size - 1) / layout.ep_size
    fine += f"; {_rate(crossing / max(taken))} a rank"
    if size < elements // layout.ep_size:
        fine += f" (the run sends {elements * dtype.itemsize / _MIB:.3g} MiB)"
    slow = slow_groups(job, layout.ep_groups, taken, timing_noise())
    return judged("all-to-all", fine, warnings=[*slow, fine] if slow else [])


def slow_groups(job: Job, groups: Sequence[Sequence[int]], seconds: Sequence[float], noise: float) -> list[str]:
    """A sentence for each group whose exchange takes much longer than the others', by more seconds than `noise`."""
    usual = sorted(seconds)[(len(seconds) - 1) // 2]
    return [
        f"the expert-parallel group of {job.name(ranks)} takes {taken * 1e3:.3g} ms, {taken / usual:.1f} times as long "
        "as most: look at the links of its hosts"
        for ranks, taken in zip(groups, seconds, strict=True)
        if taken > max(SLOW * usual, usual + noise)
    ]


def _wrong_sums(job: Job, group: Any) -> dict[int, int]:
    """Wrong elements of sums whose result is known, by the rank that gave them their value."""
    wrong: Counter[int] = Counter()
    for dtype in (torch.float32, torch.bfloat16):
        for elements in (1, 1000, 2**18 + 1):
            place = torch.arange(elements, device=job.device)
            # Below 256, so that bfloat16 holds it; one rank gives each place its value, the others zero.
            value = (place % 100 + 1).to(dtype)
            owner = place % job.ranks
            total = torch.where(owner == job.rank, value, 0)
            job.wait(dist.all_reduce(total, group=group, async_op=True))
            wrong.update(owner[total != value].tolist())
    return dict(wrong)


def _misplaced(job: Job, group: Any, size: int, dtype: torch.dtype) -> dict[int, int]:
    """Wrong elements of an exchange in which each is marked by its source, destination and place; by source."""
    # As integers of the dtype's width: what is exchanged are bits, also those that are no number.
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    ranks = dist.get_process_group_ranks(group)
    place = torch.arange(size, dtype=torch.int32, device=job.device)

    def marks(source: int, destination: int) -> Tensor:
        # Odd multiples of the place's high half, so that 16 bits tell shifted blocks apart too.
        return (place + (place >> 16) * 40503 + source * 7919 + destination * 104729).to(kind)

    sent = torch.cat([marks(job.rank, rank) for rank in ranks]).view(dtype)
    received = torch.zeros_like(sent)
    job.wait(dist.all_to_all_single(received, sent, group=group, async_op=True))
    blocks = received.view(kind).view(len(ranks), size)
    wrong = {rank: int((block != marks(rank, job.rank)).sum()) for rank, block in zip(ranks, blocks, strict=True)}
    return {rank: count for rank, count in wrong.items() if count}


def _block(job: Job, elements: int, dtype: torch.dtype, timed: bool, ranks: int) -> int:
    """Elements for each of the group's ranks: the run's, less where that would take long."""
    most = (32 if get_accelerator().device_name() == "cpu" else 1024) * _MIB if timed else _MIB // 4
    return max(1, min(elements, most // dtype.itemsize) // ranks)


def _seconds(job: Job, start: Callable[[], Any]) -> tuple[list[float], list[str]]:
    """Each rank's least time of one collective over a few of them, or sentences on why there is none."""

    def least(rounds: int) -> float:
        best = float("inf")
        for _ in range(rounds):
            begun = time.perf_counter()
            job.wait(start())
            best = min(best, time.perf_counter() - begun)
        return best

    # The first one also opens connections; the second tells all ranks how many more there is time for.
    rounds = 1
    for _ in range(3):
        outcomes = job.exchange(lambda rounds=rounds: least(rounds))  # type: ignore[misc]
        if failures := job.broken(outcomes):
            return [], failures
        seconds = [outcome.result for outcome in outcomes]
        rounds = max(1, min(9, int(_SECONDS / max(seconds))))
    return seconds, []


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.3g} GB/s"
