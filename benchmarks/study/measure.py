"""What the study measures of routers while a model trains and is evaluated.

`GateWatch` sees the gates of one process through hooks; everything else is a pure function on counts.

Shapes: W training steps, L gates, E experts, K choices a token, T tokens, S sources (classes, domains).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssr_deepspeed.monitor.metrics import DEAD_BELOW, finite
from ssr_deepspeed.routing import max_violation

FACTORS = (1.0, 1.25)
"""Capacity factors that the would-be drop rate is told for."""


@dataclass(frozen=True)
class Passes:
    """What gates did between two calls of `GateWatch.take`."""

    demand_LE: Tensor
    """float64, routes that each expert was asked to take."""
    dispatched_L: Tensor
    """float64, routes that found a slot."""
    gate_seconds: float
    """Wall time of the gates' forward passes."""


class GateWatch:
    """Counts and times the passes of some gates, in training and in evaluation.

    Recomputation by activation checkpointing is neither counted nor timed. The gates must return
    sparse routes, as `MOELayer` asks for since deepspeed 0.19.4, and have equally many experts.

    Args:
        gates: `TopKGate`s or subclasses, in the order of the layers.
    """

    def __init__(self, gates: Iterable[nn.Module]) -> None:
        self.gates = list(gates)
        self.routes: list[Tensor] = [torch.empty(0)] * len(self.gates)
        """Of each gate's last pass: experts, int `[K, T]`, -1 for a route without a slot."""
        self._began = 0.0
        self._handles = []
        for layer, gate in enumerate(self.gates):
            self._handles.append(gate.register_forward_pre_hook(self._before))
            self._handles.append(gate.register_forward_hook(self._after(layer)))
        self._clear()

    def _clear(self) -> None:
        self._demand: list[Any] = [0] * len(self.gates)
        self._dispatched: list[Any] = [0] * len(self.gates)
        self._seconds = 0.0

    def _before(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _after(self, layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: tuple[Any, ...]) -> None:
            took = time.perf_counter() - self._began
            if torch._C._current_graph_task_id() != -1:  # in a backward pass: recomputation
                return
            self._seconds += took
            self.routes[layer] = output[3]
            self._demand[layer] = self._demand[layer] + output[-1].detach().double()
            self._dispatched[layer] = self._dispatched[layer] + (output[3] >= 0).sum().double()

        return hook

    def take(self) -> Passes:
        """Counts and seconds since the last call, which begin anew.

        Raises:
            RuntimeError: a gate made no pass since then.
        """
        if any(isinstance(demand, int) for demand in self._demand):
            raise RuntimeError("a watched gate made no forward pass since the last take(): run the model first")
        passes = Passes(torch.stack(self._demand), torch.stack(self._dispatched), self._seconds)
        self._clear()
        return passes

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def dead_experts(load_LE: Tensor) -> Tensor:
    """int64 `[L]`: experts whose load is below 1 % of their layer's mean."""
    return (load_LE < DEAD_BELOW * load_LE.mean(-1, keepdim=True)).sum(-1)


def would_be_drop(demand_WLE: Tensor, factor: float) -> Tensor:
    """`[L]`: share of all routes that an expert with `ceil(factor * mean load)` slots has no room for.

    Args:
        demand_WLE: counts before capacity, of one pass for each step. Their mean over the experts is
            `k T / E`, so that the slots are those of a layer of that capacity factor.
    """
    demand_WLE = demand_WLE.double()
    slots_WL1 = torch.ceil(factor * demand_WLE.mean(-1, keepdim=True))
    return (demand_WLE - slots_WL1).clamp_min(0).sum((0, 2)) / demand_WLE.sum((0, 2))


def count_by_source(routes_KT: Tensor, source_T: Tensor, sources: int, experts: int) -> Tensor:
    """int64 `[S, E]`: routes from each source to each expert. Routes without a slot (-1) are left out.

    Args:
        routes_KT: experts.
        source_T: int64, the source of each token, in `[0, sources)`.
    """
    pair_KT = source_T * experts + routes_KT
    return pair_KT[routes_KT >= 0].bincount(minlength=sources * experts).view(sources, experts)


def mutual_information(count_SE: Tensor) -> Tensor:
    """Mutual information of source and expert in bits, over the last two dimensions of a table of counts.

    Between 0 (experts do not care where a route comes from) and the smaller of the two entropies.
    """
    joint_SE = count_SE.double() / count_SE.sum((-2, -1), keepdim=True)

    def entropy(share: Tensor) -> Tensor:
        return torch.special.entr(share).sum(-1)

    nats = entropy(joint_SE.sum(-1)) + entropy(joint_SE.sum(-2)) - entropy(joint_SE.flatten(-2))
    return nats / torch.log(torch.tensor(2.0, dtype=torch.float64))


def training_balance(steps: Iterable[Passes]) -> dict[str, Any]:
    """The balance of some training steps of one pass each, ready for JSON.

    Returns:
        `max_vio_batch`: per layer, mean of each step's MaxVio; `dead_experts`: per layer; `drop_rate`:
        by capacity factor, routes that would find no slot, mean over the layers; `trained_drop_rate`:
        routes that found none.
    """
    steps = list(steps)
    demand_WLE = torch.stack([passes.demand_LE for passes in steps])
    dispatched_WL = torch.stack([passes.dispatched_L for passes in steps])
    return {
        "max_vio_batch": numbers(max_violation(demand_WLE).mean(0)),
        "dead_experts": dead_experts(demand_WLE.sum(0)).tolist(),
        "drop_rate": {str(factor): finite(would_be_drop(demand_WLE, factor).mean()) for factor in FACTORS},
        "trained_drop_rate": finite((1 - dispatched_WL.sum(0) / demand_WLE.sum((0, 2))).mean()),
    }


def numbers(values: Tensor) -> list[float | None]:
    """A vector as JSON knows it."""
    return [finite(value) for value in values]
