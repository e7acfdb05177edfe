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
from ssr_deepspeed.monitor import LoadMonitor, Sample, sample_pass
from ssr_deepspeed.router import LocalHook


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

    def hook(module: TopKGate, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if not module.training:
            return
        ssr = module.__dict__.get("ssr")
        dispatched_E, solution = (None, None) if ssr is None else (ssr.dispatched_E, ssr.solution)
        # Every drop policy keeps as many routes as there are slots.
        capacity = None
        if module.drop_tokens:
            capacity = output[1] if len(output) == 7 else output[1].size(2)
        if monitor.add(layer, output[-1], dispatched_E, capacity, solution):
            monitor.sample(layer, solution is not None, lambda: _look(module, inputs, output))

    return gate.register_forward_hook(LocalHook(hook))


def _look(gate: TopKGate, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> Sample:
    """A closer look at one pass, from what goes in and out, whether the gate is SSR's or the host's own."""
    weight_EM = gate.wg.weight.float()
    # TopKGate leaves autocast on, SSR's does not.
    autocast = torch.is_autocast_enabled(weight_EM.device.type) and not isinstance(gate, SSRGate)
    with torch.autocast(weight_EM.device.type, enabled=autocast):
        logits_TE = nn.functional.linear(inputs[0].float().reshape(-1, weight_EM.shape[1]), weight_EM)
    if len(output) == 7:
        experts_KT = output[3] if isinstance(output[3], Tensor) else torch.stack(output[3])
        experts_TK = experts_KT.t().long()
    else:
        taken_TK, experts_TK = output[2].any(2).byte().topk(gate.k, dim=1)
        experts_TK = torch.where(taken_TK > 0, experts_TK, -1)
    used_token = inputs[1] if len(inputs) > 1 else None
    if gate.k > 1 and not isinstance(gate, SSRGate):
        used_token = None  # TopKGate heeds it for k = 1 alone: padding takes slots like any token
    used_T = None if used_token is None else used_token.reshape(-1) != 0
    potential = gate.ssr.largest_potential() if isinstance(gate, SSRGate) else None
    return sample_pass(logits_TE, experts_TK, output[-1], used_T, potential)
