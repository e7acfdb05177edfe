"""The balancing rules by the names that the configuration knows them by."""

from __future__ import annotations

from torch import Tensor

from ssr_deepspeed.config import RuleName, SSRConfig
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


def make_rule(config: SSRConfig, weight_EM: Tensor, k: int) -> Rule:
    """The rule that `config.rule` names, for the gate with this weight, where that lies."""
    experts, width = weight_EM.shape
    return RULES[config.rule](config, experts, width, k, weight_EM.device)
