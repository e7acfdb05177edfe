"""The column sums of the plan in one read of the scores: what a Sinkhorn sweep costs.

Shapes: T tokens, E experts, P programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssr_deepspeed.kernels.launch import check_scores, check_vector, tiling


def fused_columns(scaled_TE: Tensor, potential_E: Tensor, weight_T: Tensor) -> Tensor:
    """Column sums `c_j = sum_i w_i softmax_j(C_i / xi + h)` of this rank's tokens, without gradient.

    Sums are fp32 within a program and fp64 over them, in an order that does not change; columns that
    fp32 cannot hold are summed in logarithms. Rows of weight zero add nothing, whatever they contain.

    Args:
        scaled_TE: `C / xi`, fp32, finite.
        potential_E: `h = g / xi`, fp32, finite.
        weight_T: fp32, 1 for a token that takes part, 0 for one left out.

    Returns:
        fp64 `[E]`; zero where a column is below fp64's range.

    Raises:
        ValueError: a shape or dtype other than the above, or too many experts.
    """
    check_scores("scaled scores", scaled_TE)
    check_vector("potential", potential_E, torch.float32, scaled_TE.shape[1])
    check_vector("weight", weight_T, torch.float32, scaled_TE.shape[0])
    return _columns(scaled_TE, potential_E, weight_T)


@torch.library.custom_op(
    "ssr_deepspeed::columns", mutates_args=(), schema="(Tensor scaled, Tensor potential, Tensor weight) -> Tensor"
)
def _columns(scaled_TE: Tensor, potential_E: Tensor, weight_T: Tensor) -> Tensor:
    tokens, experts = scaled_TE.shape
    tiles = tiling(tokens, experts)
    columns_PE = scaled_TE.new_empty(tiles.programs, experts, dtype=torch.float64)
    if tokens:
        from ssr_deepspeed.kernels.programs import columns_program

        with torch.cuda.device_of(scaled_TE):
            columns_program[(tiles.programs,)](
                scaled_TE.contiguous(),
                potential_E.contiguous(),
                weight_T.contiguous(),
                columns_PE,
                tokens,
                E=experts,
                ROWS=tiles.rows,
                COLUMNS=tiles.columns,
            )
    return columns_PE.sum(dim=0)


@_columns.register_fake
def _(scaled_TE: Tensor, potential_E: Tensor, weight_T: Tensor) -> Tensor:
    return scaled_TE.new_empty(scaled_TE.shape[1], dtype=torch.float64)
