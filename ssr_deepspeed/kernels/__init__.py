"""Triton kernels for what the gate does in every forward pass: choosing experts, and Sinkhorn's column sums.

They compute what the plain torch functions of the other layers compute, in one read of the scores.
Triton is optional: this package imports without it, and `usable` says where it may be called.
"""

from ssr_deepspeed.kernels.columns import fused_columns
from ssr_deepspeed.kernels.launch import launchable, usable
from ssr_deepspeed.kernels.route import fused_route

__all__ = ["fused_columns", "fused_route", "launchable", "usable"]
