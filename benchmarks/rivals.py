"""Another gate's rule, written down from its formula, for the benchmarks to compare with.

Shapes: T tokens, E experts, K choices a token.
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
