"""What the gates of a training run did, seen from hooks on them.

Shapes: W steps, E experts.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from ssr_deepspeed.monitor.metrics import DEAD_BELOW
from ssr_deepspeed.routing import expert_capacity


class GateProbe:
    """Records the demand of every training pass and the time inside the gates' forward.

    Args:
        gates: by name; their order is that of the layers. Both `TopKGate` and `SSRGate`.
        last: passes of each gate to remember.
    """

    def __init__(self, gates: dict[str, TopKGate], last: int) -> None:
        self.seconds = 0.0
        """Inside the forward of all gates in training passes so far, without their backward."""
        self._demand = {name: deque[Tensor](maxlen=last) for name in gates}
        self._hooks: list[Any] = []
        for name, gate in gates.items():
            self._watch(name, gate)

    def demand(self) -> list[Tensor]:
        """Routes that each expert was asked to take, `[W, E]` float64 for each layer."""
        return [torch.stack(list(steps)).double() for steps in self._demand.values()]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, gate: TopKGate) -> None:
        began = 0.0

        def before(module: nn.Module, inputs: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def after(module: nn.Module, inputs: Any, output: tuple[Any, ...]) -> None:
            if module.training:
                self.seconds += time.perf_counter() - began
                self._demand[name].append(output[-1].detach().cpu().clone())

        self._hooks.append(gate.register_forward_pre_hook(before))
        # First of the hooks behind the gate: the load monitor's time is not the gate's.
        self._hooks.append(gate.register_forward_hook(after, prepend=True))


def drop_rate(demand_WE: Tensor, top_k: int, factor: float) -> float:
    """Share of routes that find no slot if every expert has the capacity of that factor."""
    experts = demand_WE.shape[1]
    tokens = round(float(demand_WE[0].sum()) / top_k)
    capacity = expert_capacity(tokens, experts, top_k, factor, minimum=0)
    return float((demand_WE - capacity).clamp_min(0).sum() / demand_WE.sum())


def dead_experts(demand_WE: Tensor) -> int:
    """Experts whose load over all steps is below 1 % of the mean."""
    load_E = demand_WE.sum(0)
    return int((load_E < DEAD_BELOW * load_E.mean()).sum())


def mutual_information(counts_SE: Tensor) -> float | None:
    """Bits that the expert of a route tells about its source, sources weighed equally; None for one source.

    Args:
        counts_SE: routes of each of S sources to each expert.
    """
    if len(counts_SE) < 2:
        return None
    share_SE = counts_SE.double() / counts_SE.sum(1, keepdim=True)
    entropy = torch.special.entr(share_SE.mean(0)).sum() - torch.special.entr(share_SE).sum(1).mean()
    return float(entropy / torch.log(torch.tensor(2.0, dtype=torch.float64)))
