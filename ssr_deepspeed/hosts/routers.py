"""All routers of a model, whichever host they come from: found, taken over, counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TopKGate
from torch import nn

from ssr_deepspeed.config import RULES_OF_KEY, SSRConfig
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.hosts import deepspeed_moe, inspection
from ssr_deepspeed.monitor import LoadMonitor, Sample, sample_pass
from ssr_deepspeed.router import LocalHook, Router, has_own_forward
from ssr_deepspeed.routing import asked_routes, routes_of_each
from ssr_deepspeed.token_router import HostContract, Padding, TokenRouter, refusal


@dataclass(frozen=True)
class Found:
    """A router of the model."""

    module: nn.Module
    contract: HostContract | None
    """Of a router that returns weights and indices; None for `TopKGate`."""
    experts_group: Any = None
    """The process group that shares the layer's experts; None without expert parallelism."""

    @property
    def experts(self) -> int:
        """E."""
        if self.contract is not None:
            return self.contract.experts
        assert isinstance(self.module, TopKGate)
        return self.module.wg.weight.shape[0]

    def refusal(self, config: SSRConfig) -> str | None:
        """Why it cannot be taken over, as a sentence, or None when it can."""
        if has_own_forward(self.module):
            return (
                "the router has a forward of its own (set on the instance, as accelerate's hooks do), which would "
                "shadow SSR: remove that hook before the engine is built"
            )
        if self.contract is not None:
            alone = not dist.is_initialized() or dist.get_world_size() == 1 or self.experts_group is not None
            if config.scope == "expert_parallel" and config.rule in RULES_OF_KEY["scope"] and not alone:
                return 'ssr.scope = "expert_parallel" needs expert parallelism, and this router has none around it'
            return refusal(config)
        assert isinstance(self.module, TopKGate)
        return SSRGate.refusal(self.module)

    def adopt(self, config: SSRConfig, layer: int, data_parallel_group: Any, padding: Padding) -> Router:
        """Make it one of SSR's, in place."""
        if self.contract is not None:
            return TokenRouter.adopt(
                self.module, self.contract, config, layer, data_parallel_group, padding, self.experts_group
            )
        assert isinstance(self.module, TopKGate)
        return SSRGate.adopt(self.module, config, layer, data_parallel_group)

    def count(self, monitor: LoadMonitor, layer: int, padding: Padding) -> torch.utils.hooks.RemovableHandle:
        """Have `monitor` count its training passes, whether it is SSR's or the host's own."""
        if self.contract is None:
            assert isinstance(self.module, TopKGate)
            return deepspeed_moe.count_routes(self.module, monitor, layer)
        contract, at = self.contract, self.contract.indices_at

        def look(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> Sample | None:
            logits_TE = contract.logits_of(module, inputs[0], output)
            if logits_TE is None:
                return None
            indices_TK = output[contract.indices_at].long()
            potential = module.ssr.largest_potential() if isinstance(module, TokenRouter) else None
            used_T = padding.used(len(indices_TK), indices_TK.device)
            demand_E = routes_of_each(indices_TK, asked_routes(indices_TK, used_T), contract.experts)
            return sample_pass(logits_TE, indices_TK, demand_E, used_T, potential)

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            if not module.training:
                return
            ssr = module.__dict__.get("ssr")
            solution = None if ssr is None else ssr.solution
            if ssr is not None and ssr.demand_E is not None:
                wanted = monitor.add(layer, ssr.demand_E, None, None, solution)
            else:
                wanted = monitor.add_routes(layer, output[at], padding.used_T, solution)
            if wanted:
                monitor.sample(layer, solution is not None, lambda: look(module, inputs, output))

        return self.module.register_forward_hook(LocalHook(hook))


def find_routers(model: nn.Module) -> tuple[dict[str, Found], dict[str, str]]:
    """Every router of the model by name; and what looks like one beside experts but cannot be served, with reasons."""
    gates = {name: Found(gate, None, gate.ep_group) for name, gate in deepspeed_moe.find_gates(model).items()}
    served, refused = inspection.find_token_routers(model)
    routers = {}
    for name, (module, contract) in served.items():
        # AutoEP's layer around its router knows the group.
        around = model.get_submodule(name.rpartition(".")[0])
        routers[name] = Found(module, contract, getattr(around, "ep_group", None))
    return gates | routers, refused
