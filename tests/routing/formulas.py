"""The balancing rules' parts written down again with numpy in fp64, and a gate that routes by a rule.

Shapes: T tokens, E experts, K choices a token.
"""

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit, softmax

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate


def rule_gate(rule, k=2, experts=6, width=8, drop=False, **block):
    """A gate in training that routes by `rule`, by default without transport steps and without a capacity."""
    torch.manual_seed(3)
    config = SSRConfig.from_dict({"rule": rule, "probability": 0.0, **block})
    return SSRGate(width, experts, k, 1.0, 1.0, 1, drop_tokens=drop, config=config)


def routed(gate, logits_TE, used=None, x=None):
    """Dense weights `[T, E]`, zero where nothing was routed, with their graph; and `l_aux` and the demand."""
    l_aux, _, experts, indices, _, gates, counts = gate.routes_of(logits_TE, used, True, x)
    # A spare column takes the routes without a slot.
    column_TK = torch.where(indices < 0, experts, indices).t().long()
    weights_TE = gates.new_zeros(len(logits_TE), experts + 1).scatter(1, column_TK, gates.t())[:, :-1]
    return weights_TE, l_aux, counts


def skewed(tokens, experts, seed=0):
    """Logits `[T, E]`, fp32, under which the first experts are asked for most."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) - torch.linspace(0, 2, experts)


def top_k(select_TE, weigh_TE, k):
    """Dense weights of the k experts with the largest `select`, `weigh` renormalised over them (k = 1: as it is)."""
    weights_TE = np.zeros_like(weigh_TE)
    for row, (select_E, weigh_E) in enumerate(zip(select_TE, weigh_TE, strict=True)):
        chosen = np.argsort(-select_E)[:k]
        weights_TE[row, chosen] = weigh_E[chosen] / (weigh_E[chosen].sum() if k > 1 else 1)
    return weights_TE


def counts_plan(scores_TE, potentials_E, k, xi):
    """`sigmoid((C + g - a) / xi)` with rows of sum k, each row's `a` by bracketing."""
    rows = []
    for score_E in (scores_TE + potentials_E) / xi:
        shift = brentq(lambda b, x=score_E: expit(x - b).sum() - k, score_E.min() - 50, score_E.max() + 50, xtol=1e-12)
        rows.append(expit(score_E - shift))
    return np.array(rows)


def plan_of(polytope, scores_TE, potentials_E, k, xi):
    """The plan at given potentials: rows of sum 1 (`"mass"`) or k (`"capacity"`)."""
    if polytope == "capacity":
        return counts_plan(scores_TE, potentials_E, k, xi)
    return softmax((scores_TE + potentials_E) / xi, axis=1)


def quantile_bias(score_TE, bias_E, k):
    """The bias under which every expert would have taken its share of these tokens."""
    tokens, experts = score_TE.shape
    threshold_T1 = np.sort(score_TE + bias_E, axis=1)[:, ::-1][:, k : k + 1]
    beyond_TE = np.sort(score_TE - threshold_T1, axis=0)[::-1]
    return -beyond_TE[min(k * tokens // experts, tokens - 1)]


def array(tensor):
    """The tensor's values in fp64."""
    return tensor.detach().double().numpy()
