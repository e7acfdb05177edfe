"""Counting routes on the device.

A training pass leaves what its router has counted in a list; at the optimizer step's end the lists of all layers are
added to one preallocated buffer in a few operations, whatever the number of layers. Nothing is read by the host
until an interval ends: then one all-reduce of the whole buffer and one copy bring it over for all layers together. On
an accelerator the copy runs beside the next step, after which it is read. Evaluation is not counted, nor is the
recomputation of activation checkpointing, nor padding (hosts report demand without it).

Shapes: W steps of a window, G micro-batches of a step, L layers of the whole model, E experts (of the widest layer),
R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssr_deepspeed.collectives import to_host
from ssr_deepspeed.monitor.sample import SAMPLED, Sample
from ssr_deepspeed.ot import Solution

# Behind demand and dispatch in a step's row: passes, transport passes and, of those, column error, sweeps, cap hits.
_EXTRA = 5


class Pass(NamedTuple):
    """What one training pass of a router counted. Tensors stay on the device."""

    demand_E: Tensor
    """int64, routes that experts were asked to take, without padding."""
    dispatched_E: Tensor | None = None
    """int64, routes that found a slot; None: as many as there are slots."""
    capacity: int | None = None
    """Slots of each expert; None where hosts drop nothing."""
    solution: Solution | None = None
    """Of the transport problem that the pass solved."""


@dataclass(frozen=True)
class LoadWindow:
    """Expert load of the whole model over consecutive optimizer steps, summed over all ranks. float64, on the CPU."""

    first_step: int
    """Optimizer steps taken before the window's first."""
    steps: int
    layers: list[str]
    experts: list[int]
    """Number of experts of each layer; further columns are zero."""
    demand_WLE: Tensor
    """Routes each expert was asked to take, whole numbers."""
    dispatched_WLE: Tensor
    """Routes that found a slot."""
    slots_L: Tensor
    """Slots that there were; 0 where hosts drop nothing."""
    transport_share_L: Tensor
    """Share of passes that solved a transport problem."""
    column_error_L: Tensor
    """Mean relative column error of the transport passes; NaN without one."""
    sweeps_L: Tensor
    """Mean iterations of the transport passes; NaN without one."""
    unconverged_L: Tensor
    """Share of the transport passes that ended above their tolerance; NaN without one."""
    received_GLR: Tensor
    """Routes that each rank's experts received in each micro-batch of the window's last step."""
    present_LR: Tensor
    """1 where a rank takes part in a layer's expert-parallel dispatch, else 0."""
    sampled_LX: Tensor
    """Sums of one pass a rank; see `monitor.sample`."""


class LoadMonitor:
    """Counts the routes of some routers.

    Args:
        layers: names of all routers of the model, over all pipeline stages.
        experts: number of experts of each.
        interval: optimizer steps of a window, at least 1.
        device: where the routers run.
        copies: ranks that count the same tokens (the tensor-parallel size).
        micro_batches: of an optimizer step; further ones are added to the last.
    """

    def __init__(
        self,
        layers: list[str],
        experts: list[int],
        interval: int,
        device: torch.device,
        copies: int = 1,
        micro_batches: int = 1,
    ) -> None:
        self.layers, self.experts, self.interval, self.copies = layers, experts, interval, copies
        self.reads_at_once = device.type == "cpu"
        self._width, self._micro_batches = max(experts), micro_batches
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        shapes = {
            "steps": (interval, len(layers), 2 * self._width + _EXTRA),
            "sampled": (len(layers), 2 * self._width + SAMPLED),
            "slots": (len(layers), 1),
            "present": (len(layers), ranks),
            "received": (micro_batches, len(layers), ranks),
        }
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self._buffer = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self._shapes, self._sizes = shapes, sizes
        self._parts = self._views(self._buffer)
        self._passes: list[tuple[int, Pass]] = []
        self._slots = [0] * len(layers)
        self._places: dict[int, Tensor] = {}
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._sampled: dict[int, bool] = {}
        self._row = 0
        self._first_step: int | None = None
        self._pending: tuple[int, int, Tensor, Any] | None = None

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        parts = buffer.split(self._sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def place(self, layer: int, ranks: list[int]) -> None:
        """Tell which ranks share a layer's experts, this one among them, in the order of the experts they hold."""
        if len(ranks) > 1:
            self._places[layer] = torch.tensor(ranks, device=self._buffer.device)

    def add(self, layer: int, counted: Pass) -> None:
        """Count one training pass of one router. Skipped while backward recomputes activations.

        Args:
            layer: index into `layers`.
            counted: this rank's counts; kept until the step's end.
        """
        if torch._C._current_graph_task_id() == -1:
            self._passes.append((layer, counted))

    def sample(self, layer: int, transport: bool, look: Callable[[], Sample | None]) -> None:
        """Have a closer look at one training pass of each layer and window: the first, or the first transport pass."""
        if self._sampled.get(layer, False) >= transport and layer in self._sampled:
            return
        if torch._C._current_graph_task_id() != -1:
            return
        self._sampled[layer] = transport
        with torch.no_grad():
            sample = look()
        if sample is not None:
            self._parts["sampled"][layer] = sample.row(self._width)

    def end_step(self, step: int) -> LoadWindow | None:
        """Close optimizer step `step` (steps taken before it); a window that has ended and is here.

        Windows end where the number of steps taken is a multiple of the interval, also in a run
        that was resumed between two ends. On that step every rank takes part in one all-reduce. On an accelerator
        its window comes at the next call.
        """
        if self._first_step is None:
            self._first_step = step
        ends = (step + 1) % self.interval == 0 or self._row + 1 == self.interval
        self._fold(ends)
        self._row += 1
        window = self.settle()
        if ends:
            self._reduce(self._first_step)
            if self.reads_at_once:
                return self.settle()
        return window

    def settle(self) -> LoadWindow | None:
        """The window that is still on its way to the host, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        first_step, steps, host, copied = pending
        if copied is not None:
            copied.synchronize()
        return self._window(first_step, steps, self._views(host))

    def save(self) -> dict[str, Any]:
        """The counts of the window that has begun, summed over all ranks, on the CPU. Every rank calls it."""
        total = self._collected().cpu()
        steps_WLX = self._views(total).pop("steps")[: self._row].clone()
        rest = total[self._sizes[0] :].clone()
        key = (self.layers, self.experts, self.interval, self._micro_batches)
        return {"key": key, "first_step": self._first_step, "steps": steps_WLX, "rest": rest}

    def load(self, saved: dict[str, Any] | None) -> None:
        """Go on with a saved window, or begin a new one where there is none of the same layers and interval."""
        self._begin()
        key = (self.layers, self.experts, self.interval, self._micro_batches)
        if saved is None or saved["key"] != key or saved["first_step"] is None:
            return
        self._first_step, self._row = saved["first_step"], len(saved["steps"])
        if self._rank == 0:  # the others' counts are in it
            self._parts["steps"][: self._row] = saved["steps"]
            rest = self._buffer[self._sizes[0] :]
            if len(rest) == len(saved["rest"]):
                rest.copy_(saved["rest"])
                self._parts["present"].zero_()  # every rank says so again

    def _fold(self, last: bool) -> None:
        """Add the step's passes to the buffer."""
        passes, self._passes = self._passes, []
        for experts in {self.experts[layer] for layer, _ in passes}:
            alike = [(layer, counted) for layer, counted in passes if self.experts[layer] == experts]
            self._add(alike, experts, last)
        solved = [(layer, counted.solution) for layer, counted in passes if counted.solution is not None]
        if solved:
            figures = [(s.error, s.iterations, ~s.converged) for _, s in solved]
            rows_NX = torch.stack([torch.stack([f.double() for f in row]) for row in figures])
            index_N = self._tensor(tuple(layer for layer, _ in solved))
            row_LX = self._parts["steps"][self._row]
            row_LX[:, -3:].index_add_(0, index_N, rows_NX)
            row_LX[:, -4].index_add_(0, index_N, torch.ones_like(rows_NX[:, 0]))

    def _add(self, passes: list[tuple[int, Pass]], experts: int, last: bool) -> None:
        """Add passes of layers with that many experts."""
        layers = tuple(layer for layer, _ in passes)
        demand_NE = torch.stack([counted.demand_E for _, counted in passes]).double()
        dispatched_NE = self._dispatched(passes, demand_NE)
        index_N = self._tensor(layers)
        row_LX = self._parts["steps"][self._row]
        row_LX[:, :experts].index_add_(0, index_N, demand_NE)
        row_LX[:, self._width : self._width + experts].index_add_(0, index_N, dispatched_NE)
        row_LX[:, -5].index_add_(0, index_N, torch.ones_like(demand_NE[:, 0]))
        for layer, counted in passes:
            self._slots[layer] += experts * (counted.capacity or 0)
        if last and self._places:
            self._receive(layers, dispatched_NE)

    def _dispatched(self, passes: list[tuple[int, Pass]], demand_NE: Tensor) -> Tensor:
        if any(counted.dispatched_E is not None for _, counted in passes):
            kept = [c.demand_E if c.dispatched_E is None else c.dispatched_E for _, c in passes]
            dispatched_NE = torch.stack(kept).double()
        else:
            dispatched_NE = demand_NE
        capacities = tuple(float("inf") if c.capacity is None else float(c.capacity) for _, c in passes)
        return torch.minimum(dispatched_NE, self._tensor(capacities, torch.float64).unsqueeze(1))

    def _receive(self, layers: tuple[int, ...], dispatched_NE: Tensor) -> None:
        """Add to what the ranks have received, micro-batch by micro-batch."""
        seen: dict[int, int] = {}
        for layer, dispatched_E in zip(layers, dispatched_NE, strict=True):
            micro_batch = seen[layer] = seen.get(layer, -1) + 1
            ranks = self._places.get(layer)
            if ranks is not None:
                row_R = self._parts["received"][min(micro_batch, self._micro_batches - 1), layer]
                row_R.index_add_(0, ranks, dispatched_E.view(len(ranks), -1).sum(1))

    def _tensor(self, values: tuple[Any, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        """The values on the device. The same ones come at every step, and copying them would stall it."""
        key = (dtype, *values)
        if key not in self._tensors:
            if len(self._tensors) > 64:
                self._tensors.clear()
            self._tensors[key] = torch.tensor(values, dtype=dtype, device=self._buffer.device)
        return self._tensors[key]

    def _reduce(self, first_step: int) -> None:
        """Sum the buffer over all ranks, send it to the host and begin anew."""
        total = self._collected()
        host, copied = (total, None) if self.reads_at_once else to_host(total)
        self._pending = (first_step, self._row, host, copied)
        self._begin()

    def _collected(self) -> Tensor:
        """The buffer's sum over all ranks."""
        total = self._buffer.clone()
        parts = self._views(total)
        parts["slots"][:, 0] += torch.tensor(self._slots, dtype=torch.float64).to(total.device)
        for layer in self._places:
            parts["present"][layer, self._rank] = 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total

    def _begin(self) -> None:
        """Begin a window."""
        self._buffer.zero_()
        self._passes = []
        self._slots = [0] * len(self.layers)
        self._sampled = {}
        self._row, self._first_step = 0, None

    def _window(self, first_step: int, steps: int, parts: dict[str, Tensor]) -> LoadWindow:
        rows_WLX = parts["steps"][:steps]
        passes_L, solved_L, error_L, sweeps_L, unconverged_L = rows_WLX[..., -_EXTRA:].sum(0).unbind(-1)
        return LoadWindow(
            first_step,
            steps,
            self.layers,
            self.experts,
            rows_WLX[..., : self._width] / self.copies,
            rows_WLX[..., self._width : 2 * self._width] / self.copies,
            parts["slots"][:, 0] / self.copies,
            solved_L / passes_L,
            error_L / solved_L,
            sweeps_L / solved_L,
            unconverged_L / solved_L,
            parts["received"],
            parts["present"],
            parts["sampled"],
        )
