"""Collectives as plain functions, so that solvers need to know no process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssr_deepspeed.ot import Sum


def sum_over(group: Any) -> Sum | None:
    """The sum of a tensor over the ranks of `group`, or None where there is nothing to sum.

    Every rank of the group must call it equally often, in the same order.
    """
    if group is None or not dist.is_initialized() or dist.get_world_size(group) == 1:
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
    if group is None or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tensor
    largest = tensor.clone()
    dist.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return largest
