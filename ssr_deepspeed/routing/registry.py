"""The balancing rules by the names that the configuration knows them by."""

from __future__ import annotations

import torch

from ssr_deepspeed.config import RuleName, SSRConfig
from ssr_deepspeed.kernels import launchable
from ssr_deepspeed.routing.carried import Carried
from ssr_deepspeed.routing.fresh import CapacityPolytope, SBase, Selective
from ssr_deepspeed.routing.rivals import (
    AuxiliaryLoss,
    GlobalAuxiliaryLoss,
    LossFreeBias,
    NoisyTopK,
    QuantileBalancing,
    ZLoss,
)
from ssr_deepspeed.routing.rules import Rule

RULES: dict[RuleName, type[Rule]] = {
    "ssr": Selective,
    "capacity": CapacityPolytope,
    "carried": Carried,
    "s_base": SBase,
    "none": Rule,
    "auxiliary": AuxiliaryLoss,
    "global_auxiliary": GlobalAuxiliaryLoss,
    "z": ZLoss,
    "noisy": NoisyTopK,
    "loss_free": LossFreeBias,
    "quantile": QuantileBalancing,
}


def make_rule(config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> Rule:
    """The rule that `config.rule` names, for a router of that many experts whose input is that wide."""
    if device.type == "cuda":
        launchable()  # a compiled gate could not ask
    return RULES[config.rule](config, experts, width, k, device)
