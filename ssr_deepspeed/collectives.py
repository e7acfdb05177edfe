"""Collectives as plain functions, so that solvers need to know no process group."""

from __future__ import annotations

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


def gather_objects(item: Any) -> list[Any]:
    """`item` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def maximum_over(group: Any, tensor: Tensor) -> Tensor:
    """The elementwise maximum of `tensor` over the ranks of `group`."""
    if _alone(group):
        return tensor
    largest = tensor.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """A copy on its way to the host, and the event to synchronise with before it is read."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = get_accelerator().Event()
    copied.record()
    return host, copied


def _alone(group: Any) -> bool:
    return group is None or not dist.is_initialized() or dist.get_world_size(group) == 1
