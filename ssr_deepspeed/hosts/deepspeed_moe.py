"""Host: `deepspeed.moe.layer.MoE`, whose gates are `TopKGate`.

Tested with the versions of DeepSpeed in `ssr_deepspeed/versions.py`. The gate's class is swapped
in place, the narrowest change there is: the weight, its name, optimizer and ZeRO
hooks, `engine.gate_modules` and the expert-parallel group all stay. Gates of another class are never touched.

Not covered: Tutel (the return form is there, but it was not run).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.monitor import LoadMonitor


def find_gates(model: nn.Module) -> dict[str, TopKGate]:
    """Every gate of the model by its name, `TopKGate` and its subclasses."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TopKGate)}


def unused_options(gates: Iterable[nn.Module]) -> list[str]:
    """`TopKGate` options set by the user that play no part under SSR, for one warning."""
    unused = set()
    for gate in gates:
        if isinstance(gate, TopKGate) and gate.noisy_gate_policy not in (None, "None"):
            unused.add(f"noisy_gate_policy={gate.noisy_gate_policy!r} (use ssr.noise)")
    return sorted(unused)


def count_routes(gate: TopKGate, monitor: LoadMonitor, layer: int) -> torch.utils.hooks.RemovableHandle:
    """Have `monitor` count every training pass of a gate, `SSRGate` or plain `TopKGate`."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if not module.training:
            return
        demand_E = output[-1]
        capacity = output[1] if len(output) == 7 else output[1].shape[2]
        error: Tensor | None = None
        # Every drop policy keeps as many routes as there are slots.
        dispatched_E = torch.clamp(demand_E, max=capacity)
        if isinstance(module, SSRGate):
            if module.ssr.solution is not None:
                error = module.ssr.solution.error
            if module.ssr.dispatched_E is not None:
                dispatched_E = module.ssr.dispatched_E
        monitor.add(layer, demand_E, dispatched_E, error)

    return gate.register_forward_hook(hook)
