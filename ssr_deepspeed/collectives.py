"""Collectives as plain functions, so that solvers need to know no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ssr_deepspeed.ot import Sum


def sum_over(group: Any) -> Sum | None:
    """The sum of a tensor over the ranks of `group`, or None where there is nothing to sum.

    Every rank of the group must call it equally often, in the same order.
    """
    if _alone(group):
        return None

    def reduce(tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    return reduce


def from_first(group: Any) -> Callable[[Tensor], Tensor]:
    """What gives every rank of `group` the first one's tensor, in place; of one rank alone its own."""
    if _alone(group):
        return lambda tensor: tensor
    first = dist.get_process_group_ranks(group)[0]

    def spread(tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, first, group=group)
        return tensor

    return spread


def gather_objects(item: Any, group: Any = None) -> list[Any]:
    """`item` of every rank of `group` (by default all), in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Do `work`; its result, and what ended it if something did, as a sentence to gather.

    Whatever it is, it must not be raised where other ranks wait for this one.
    """
    try:
        return work(), None
    except ValueError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def maximum_over(group: Any, tensor: Tensor) -> Tensor:
    """The elementwise maximum of `tensor` over the ranks of `group`."""
    if _alone(group):
        return tensor
    largest = tensor.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def numbers_of(group: Any, numbers: Sequence[int]) -> dict[int, list[int]]:
    """`numbers` of every rank of `group`, by rank, on every rank. The group must take tensors on the CPU."""
    own = torch.tensor(numbers, device="cpu")
    theirs = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, own, group=group)
    return dict(zip(dist.get_process_group_ranks(group), (each.tolist() for each in theirs), strict=True))


def host_groups(groups: Sequence[Any], device: torch.device) -> list[Any]:
    """For each group one of the same ranks that takes tensors on the CPU; None for one rank alone.

    Args:
        groups: of this rank; its peers have the same ones.
        device: whose tensors they take.
    """
    if device.type == "cpu":
        return [None if _alone(group) else group for group in groups]
    own = [() if _alone(group) else tuple(dist.get_process_group_ranks(group)) for group in groups]
    # In one order on all ranks, so that no two wait for each other.
    made = {ranks: host_group(ranks) for ranks in sorted(set(own)) if ranks}
    return [made.get(ranks) for ranks in own]


def host_group(ranks: Sequence[int] | None = None, timeout: timedelta | None = None) -> Any:
    """A group that takes tensors on the CPU, called by its members alone: under NCCL others would join in a split.

    Args:
        ranks: of the group; None for all.
        timeout: of its collectives; torch's own by default.

    Raises:
        RuntimeError: the hosts cannot reach each other by their own names.
    """
    try:
        every = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        return dist.new_group(every, timeout, backend="gloo", use_local_synchronization=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"the hosts cannot meet over gloo ({str(error).splitlines()[0]}), by which small messages go also where "
            "NCCL does the work: set GLOO_SOCKET_IFNAME to the network interface that joins them"
        ) from error


def to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """A copy on its way to the host, and the event to synchronise with before it is read."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = get_accelerator().Event()
    copied.record()
    return host, copied


def _alone(group: Any) -> bool:
    return group is None or not dist.is_initialized() or dist.get_world_size(group) == 1
