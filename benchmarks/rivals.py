"""Other gates' rules, written down from their formulas, for the benchmarks to compare with.

Each takes logits `Z [T, E]` with their graph and gives experts and weights `[T, K]`, weights with a
gradient. Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def primal_sinkhorn(logits_TE: Tensor, k: int, turns: int = 100) -> tuple[Tensor, Tensor, int]:
    """Megatron-core's `sinkhorn` load balancing: plain exponentials, scaled until the scaling stands still.

    The plan selects, the softmax weighs. The original has no cap and asks the device at every turn
    whether the mean change of the column scaling is below 1e-4; here `turns` ends it, and the
    number of turns comes back as the third item.

    Source: the rule in megatron/core/transformer/moe/moe_utils.py, reimplemented from its formula.
    """
    with torch.no_grad():
        kernel_TE = logits_TE.float().exp()
        tokens, experts = kernel_TE.shape
        row_T, column_E = kernel_TE.new_ones(tokens), kernel_TE.new_ones(experts)
        used = 0
        for turn in range(turns):
            used = turn + 1
            row_T = 1 / (kernel_TE @ column_E * tokens + 1e-8)
            new_E = 1 / (row_T @ kernel_TE * experts + 1e-8)
            change = (new_E - column_E).abs().mean()
            column_E = new_E
            if change < 1e-4:
                break
        experts_TK = (kernel_TE * column_E * row_T.unsqueeze(1)).topk(k, dim=1).indices
    weights_TK = torch.softmax(logits_TE, dim=1).gather(1, experts_TK)
    return experts_TK, weights_TK, used


class QuantileBalancing:
    """Quantile Balancing: a bias per expert, set to the quantile at which it takes its fair share.

    Select the top k of `s - b` with the bias of the step before; then with `a_i` the (k + 1)-th
    largest of `s_i - b`, `b_j` is the `(k T / E + 1)`-th largest of `s_.j - a`. The weights are the
    scores at the chosen experts, renormalised for k > 1. Scores are the softmax.

    Source: kexue.fm 11619.
    """

    def __init__(self, experts: int, device: str = "cpu") -> None:
        self.bias_E = torch.zeros(experts, device=device)

    def __call__(self, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        tokens, experts = logits_TE.shape
        scores_TE = torch.softmax(logits_TE, dim=1)
        with torch.no_grad():
            biased_TE = scores_TE - self.bias_E
            top_TK, experts_TK = biased_TE.topk(min(k + 1, experts), dim=1)
            experts_TK = experts_TK[:, :k]
            if k < experts:
                rank = min(k * tokens // experts, tokens - 1)
                beyond_TE = scores_TE - top_TK[:, -1:]
                self.bias_E = beyond_TE.topk(rank + 1, dim=0).values[-1]
        weights_TK = scores_TE.gather(1, experts_TK)
        if k > 1:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        return experts_TK, weights_TK
