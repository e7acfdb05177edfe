"""Counting routes on the device.

One buffer `[W, L, 2E + 3]` for the whole model and the W steps of one interval. A training pass adds
to it in place; nothing is read by the host until the interval ends, when one all-reduce and one
copy bring it over for all layers and steps together. Evaluation is not counted, nor is the
recomputation of activation checkpointing, nor padding (hosts report demand without it).

Shapes: W steps of a window, L layers of the whole model, E experts (of the widest layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Behind demand and dispatch: passes, transport passes, sum of column errors.
_EXTRA = 3


@dataclass(frozen=True)
class LoadWindow:
    """Expert load of the whole model over some consecutive optimizer steps, summed over all ranks."""

    first_step: int
    """Optimizer steps taken before the window's first."""
    steps: int
    layers: list[str]
    experts: list[int]
    """Number of experts of each layer; further columns are zero."""
    demand_WLE: Tensor
    """Routes each expert was asked to take. float64 on the CPU, whole numbers."""
    dispatched_WLE: Tensor
    """Routes that found a slot."""
    transport_share_L: Tensor
    """Share of passes routed by transport."""
    column_error_L: Tensor
    """Mean relative column error of the transport passes; NaN without one."""


class LoadMonitor:
    """Counts the routes of some routers.

    Args:
        layers: names of all routers of the model, over all pipeline stages.
        experts: number of experts of each.
        interval: optimizer steps of a window, at least 1.
        device: where the routers run.
        copies: ranks that count the same tokens (the tensor-parallel size).
    """

    def __init__(self, layers: list[str], experts: list[int], interval: int, device: torch.device, copies: int = 1):
        self.layers, self.experts, self.interval, self.copies = layers, experts, interval, copies
        self._width = max(experts)
        self._buffer_WLX = torch.zeros(
            interval, len(layers), 2 * self._width + _EXTRA, dtype=torch.float64, device=device
        )
        self._row = 0
        self._first_step: int | None = None

    def add(self, layer: int, demand_E: Tensor, dispatched_E: Tensor, column_error: Tensor | None) -> None:
        """Count one training pass of one router. Skipped while backward recomputes activations.

        Args:
            layer: index into `layers`.
            demand_E: routes asked for, this rank's.
            dispatched_E: routes that found a slot.
            column_error: of a transport pass, 0-dim; None for a softmax pass.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        row_X = self._buffer_WLX[self._row, layer]
        row_X[: len(demand_E)] += demand_E
        row_X[self._width : self._width + len(demand_E)] += dispatched_E
        row_X[-3] += 1
        if column_error is not None:
            row_X[-2] += 1
            row_X[-1] += column_error

    def end_step(self, step: int) -> LoadWindow | None:
        """Close optimizer step `step` (steps taken before it); at the interval's end, report.

        Windows end where the number of steps taken is a multiple of the interval, also in a run
        that was resumed between two ends. On that step every rank takes part in one all-reduce.
        """
        if self._first_step is None:
            self._first_step = step
        self._row += 1
        if (step + 1) % self.interval and self._row < self.interval:
            return None
        window = self._collect(self._first_step, self._row)
        self._buffer_WLX.zero_()
        self._row, self._first_step = 0, None
        return window

    def _collect(self, first_step: int, steps: int) -> LoadWindow:
        total_WLX = self._buffer_WLX[:steps].clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total_WLX)
        total_WLX = total_WLX.cpu()
        demand_WLE = total_WLX[..., : self._width] / self.copies
        dispatched_WLE = total_WLX[..., self._width : 2 * self._width] / self.copies
        passes_L, transport_L, error_L = total_WLX[..., -3:].sum(0).unbind(-1)
        return LoadWindow(
            first_step,
            steps,
            self.layers,
            self.experts,
            demand_WLE,
            dispatched_WLE,
            transport_L / passes_L,
            error_L / transport_L,
        )
