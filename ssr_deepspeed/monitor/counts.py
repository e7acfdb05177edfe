"""Counting routes on the device.

A training pass leaves what its router has counted in a list; passes of all layers, and of several steps where
they are few, are added to one preallocated buffer together, in a few operations. Nothing is read by the host until
an interval ends: then one all-reduce of the whole buffer and one copy bring it over for all layers together. On an
accelerator the copy runs beside the next step, after which it is read. Evaluation is not counted, nor is the
recomputation of activation checkpointing, nor padding (hosts report demand without it).

Shapes: W steps of a window, G micro-batches of a step, L layers of the whole model, E experts (of the widest layer),
R ranks, T tokens, K choices a token, N passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.compiler import is_dynamo_compiling

from ssr_deepspeed.collectives import to_host
from ssr_deepspeed.monitor.sample import SAMPLED, Sample
from ssr_deepspeed.ot import Solution

# Behind demand and dispatch in a step's row: passes, transport passes and, of those, column error, sweeps, cap hits.
_EXTRA = 5
# Passes that wait to be added together. One operation costs as much for many as for one.
_AT_ONCE = 128
# Routes whose indices wait to be counted together: 8 MiB.
_MOST_ROUTES = 2**20


class _Pass(NamedTuple):
    """What one training pass of a router counted; see `LoadMonitor.add`."""

    step: int
    """Of the window."""
    layer: int
    demand_E: Tensor
    dispatched_E: Tensor | None
    capacity: int | Tensor | None
    solution: Solution | None


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


class _Rows:
    """Room for passes as rows of the buffer; those with the same steps and layers in the same order share it.

    Args:
        places: of the N passes among the rows `[W L]` from the first pass's step on.
        experts: of the passes' layers.
        width: experts of the widest layer.
        like: a tensor on the device.
    """

    def __init__(self, places: tuple[int, ...], experts: int, width: int, like: Tensor) -> None:
        self._values_NX = like.new_zeros(len(places), 2 * width + _EXTRA)
        self.demand_NE = self._values_NX[:, :experts]
        self.dispatched_NE = self._values_NX[:, width : width + experts]
        self._values_NX[:, -_EXTRA] = 1
        self._solved_NX = self._values_NX[:, 1 - _EXTRA :]
        self._any_solved = False
        self._none, self._one = like.new_zeros(()), like.new_ones(())
        self._places_N: Tensor | None = None
        if places != tuple(range(len(places))):
            # Pinned, and so copied without waiting for the device.
            places_N = torch.tensor(places, device="cpu", pin_memory=like.device.type == "cuda")
            self._places_N = places_N.to(like.device, non_blocking=True)

    def set_solutions(self, solutions: list[Solution | None]) -> None:
        """What the passes' transport problems came to; zeros where there was none."""
        found = [solution for solution in solutions if solution is not None]
        if found:
            error_N = torch.stack([self._none if s is None else s.error for s in solutions])
            columns = (
                torch.stack([self._none if s is None else self._one for s in solutions]),
                error_N,
                torch.stack([self._none if s is None else s.iterations for s in solutions]),
                # One configuration, one tolerance. A NaN is not within it.
                ~(error_N <= found[0].tolerance),
            )
            torch.stack([column.double() for column in columns], 1, out=self._solved_NX)
        elif self._any_solved:
            self._solved_NX.zero_()
        self._any_solved = bool(found)

    def add_to(self, rows_NX: Tensor, first: int) -> None:
        """Add the passes to the buffer's rows of all steps and layers, from that row on."""
        if self._places_N is None:
            rows_NX[first : first + len(self._values_NX)].add_(self._values_NX)
        else:
            rows_NX.index_add_(0, self._places_N + first, self._values_NX)


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
        self._passes: list[tuple[Any, ...]] = []
        self._uncounted: list[tuple[int, int, Tensor, Tensor | None, Solution | None]] = []
        self._routes = 0
        self._slots = [0] * len(layers)
        self._places: dict[int, Tensor] = {}
        self._rows: dict[tuple[int, tuple[int, ...]], _Rows] = {}
        # Whether there was a closer look in this window, at a softmax pass (0) or a transport pass (1); else -1.
        self._sampled = [-1] * len(layers)
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

    def add(
        self,
        layer: int,
        demand_E: Tensor,
        dispatched_E: Tensor | None = None,
        capacity: int | Tensor | None = None,
        solution: Solution | None = None,
    ) -> bool:
        """Count one training pass of one router. Skipped while backward recomputes activations.

        The tensors stay on the device, and are kept until they are added to the buffer.

        Args:
            layer: index into `layers`.
            demand_E: int64, routes that experts were asked to take, without padding.
            dispatched_E: int64, routes that found a slot; None: as many as there are slots.
            capacity: slots of each expert, a tensor on the CPU if it is one; None where hosts drop nothing.
            solution: of the transport problem that the pass solved.

        Returns:
            Whether a closer look at this pass is wanted, by `sample`.
        """
        # Between two layers' kernels nothing is in the processor's caches, and every frame, object and call costs a
        # microsecond or more: so `router.recomputes` is written out here, and a plain tuple kept.
        if not is_dynamo_compiling() and _current_graph_task_id() != -1:
            return False
        self._passes.append((self._row, layer, demand_E, dispatched_E, capacity, solution))
        return self._sampled[layer] < (solution is not None)

    def add_routes(self, layer: int, indices_TK: Tensor, used: Tensor | None, solution: Solution | None) -> bool:
        """As `add`, for a router whose host drops nothing and does not say its demand.

        Args:
            layer: index into `layers`.
            indices_TK: chosen experts.
            used: bool, on any device, false for padding; one tensor for all layers saves time. None, or another
                number of entries than T: no padding.
            solution: of the transport problem that the pass solved.
        """
        if not is_dynamo_compiling() and _current_graph_task_id() != -1:
            return False
        self._uncounted.append((self._row, layer, indices_TK, used, solution))
        self._routes += indices_TK.numel()
        if self._routes >= _MOST_ROUTES:
            self._count()
        return self._sampled[layer] < (solution is not None)

    def sample(self, layer: int, transport: bool, look: Callable[[], Sample | None]) -> None:
        """Have a closer look at a pass that asks for it: the first of each window, and the first by transport."""
        self._sampled[layer] = int(transport)
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
        self._row += 1
        if ends or len(self._passes) + len(self._uncounted) >= _AT_ONCE:
            self._fold(ends)
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
        self._fold(False)
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
        rest = self._buffer[self._sizes[0] :]
        same_ranks = len(rest) == len(saved["rest"])
        if same_ranks:
            sampled_LX = saved["rest"][: self._sizes[1]].view(self._shapes["sampled"])
            # A closer look is not taken again; where there was a transport pass, it was at one.
            seen, solved = sampled_LX[:, SAMPLED - 1] > 0, saved["steps"][..., 1 - _EXTRA].sum(0) > 0
            self._sampled = torch.where(seen, solved.long(), -1).tolist()
        if self._rank == 0:  # the others' counts are in it
            self._parts["steps"][: self._row] = saved["steps"]
            slots = saved["rest"][self._sizes[1] :][: len(self.layers)]  # where they are for any number of ranks
            self._parts["slots"].copy_(slots.view(-1, 1))
            if same_ranks:
                rest.copy_(saved["rest"])
                self._parts["present"].zero_()  # every rank says so again

    def _count(self) -> None:
        """Count the routes of passes that wait, those of the same padding and number of experts in one operation."""
        passes, self._uncounted, self._routes = self._uncounted, [], 0
        for _, run in itertools.groupby(passes, lambda one: (id(one[3]), one[2].shape, self.experts[one[1]])):
            alike = list(run)
            _, layer, _, used, _ = alike[0]
            indices_NTK = torch.stack([indices_TK for _, _, indices_TK, _, _ in alike]).long()
            asked_NTK = torch.ones_like(indices_NTK)
            if used is not None and len(used) == asked_NTK.shape[1]:
                asked_NTK *= used.to(asked_NTK.device, non_blocking=True).view(-1, 1)
            demand_NE = indices_NTK.new_zeros(len(alike), self.experts[layer])
            demand_NE.scatter_add_(1, indices_NTK.flatten(1), asked_NTK.flatten(1))
            for (step, layer, *_, solution), demand_E in zip(alike, demand_NE.unbind(0), strict=True):
                self._passes.append((step, layer, demand_E, None, None, solution))

    def _fold(self, last: bool) -> None:
        """Add the passes of the steps that are over to the buffer."""
        self._count()
        passes = sorted([_Pass(*one) for one in self._passes if one[0] < self._row], key=lambda one: one.step)
        self._passes = [one for one in self._passes if one[0] >= self._row]
        for experts in sorted({self.experts[one.layer] for one in passes}):
            self._add([one for one in passes if self.experts[one.layer] == experts], experts, last)

    def _add(self, passes: list[_Pass], experts: int, last: bool) -> None:
        """Add passes of layers with that many experts, in as few operations as there can be: they take the time."""
        first = passes[0].step * len(self.layers)
        rows = self._rows_for(tuple([one.step * len(self.layers) + one.layer - first for one in passes]), experts)
        rows.demand_NE.copy_(torch.stack([one.demand_E for one in passes]))
        if any(one.dispatched_E is not None for one in passes):
            kept = [one.demand_E if one.dispatched_E is None else one.dispatched_E for one in passes]
            rows.dispatched_NE.copy_(torch.stack(kept))
        else:
            rows.dispatched_NE.copy_(rows.demand_NE)
        # Equal ones together, and as numbers: a copy of them to the device would wait for it.
        capacities = [None if one.capacity is None else int(one.capacity) for one in passes]
        start = 0
        for capacity, run in itertools.groupby(capacities):
            stop = start + len(list(run))
            if capacity is not None:
                rows.dispatched_NE[start:stop].clamp_(max=capacity)
                for one in passes[start:stop]:
                    self._slots[one.layer] += experts * capacity
            start = stop
        rows.set_solutions([one.solution for one in passes])
        rows.add_to(self._parts["steps"].view(-1, 2 * self._width + _EXTRA), first)
        if last and self._places:
            here = [place for place, one in enumerate(passes) if one.step == self._row - 1]
            self._receive([passes[place].layer for place in here], rows.dispatched_NE[here[0] :] if here else [])

    def _rows_for(self, places: tuple[int, ...], experts: int) -> _Rows:
        rows = self._rows.get((experts, places))
        if rows is None:
            if len(self._rows) > 8:
                self._rows.clear()
            rows = self._rows[experts, places] = _Rows(places, experts, self._width, self._buffer)
        return rows

    def _receive(self, layers: list[int], dispatched_NE: Iterable[Tensor]) -> None:
        """Add to what the ranks have received, micro-batch by micro-batch."""
        seen: dict[int, int] = {}
        for layer, dispatched_E in zip(layers, dispatched_NE, strict=True):
            micro_batch = seen[layer] = seen.get(layer, -1) + 1
            ranks = self._places.get(layer)
            if ranks is not None:
                row_R = self._parts["received"][min(micro_batch, self._micro_batches - 1), layer]
                row_R.index_add_(0, ranks, dispatched_E.view(len(ranks), -1).sum(1))

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
        slots_L = torch.tensor(self._slots, dtype=torch.float64, device="cpu", pin_memory=total.device.type == "cuda")
        parts["slots"][:, 0] += slots_L.to(total.device, non_blocking=True)
        for layer in self._places:
            parts["present"][layer, self._rank].fill_(1)  # assigned, a number is copied, and the device waited for
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total

    def _begin(self) -> None:
        """Begin a window."""
        self._buffer.zero_()
        self._passes, self._uncounted, self._routes = [], [], 0
        self._slots = [0] * len(self.layers)
        self._sampled = [-1] * len(self.layers)
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
