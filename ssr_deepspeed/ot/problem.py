"""The transport problem between tokens and experts, and what a solver returns.

    maximise  <P, C> - xi <P, log P>   over P > 0,  sum_j P_ij = 1,  sum_i P_ij = s = T / E

with compatibility `C [T, E]` and entropy weight `xi` (arXiv 2511.08972). Its solution is
`P_ij = softmax_j((C_ij + g_j) / xi)`: one expert potential `g_j` per expert says it all, and the
`T x E` plan need never be stored. Tokens that a mask leaves out belong to no sum and not to `T`.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
"""Sum of a tensor over the ranks that share one problem; called equally often on each of them."""


@dataclass(frozen=True)
class Solution:
    """Expert potentials and how good they are. Nothing in it has been read by the host yet."""

    potentials: Tensor
    """`g [E]`, mean zero, in units of the scores; fp32, or fp64 for fp64 scores."""
    error: Tensor
    """Relative column error `max_j |c_j - s| / s` of these potentials, a 0-dim tensor."""
    iterations: Tensor
    """Sweeps that changed the potentials, a 0-dim int64 tensor."""
    tolerance: float
    """The error asked for."""

    @property
    def converged(self) -> Tensor:
        """Whether the error is within the tolerance, a 0-dim bool tensor."""
        return self.error <= self.tolerance

    @property
    def result(self) -> str:
        """Empty when converged, else a sentence with cause and remedy. Reads from the device."""
        if bool(self.converged):
            return ""
        return (
            f"the transport problem was left at a relative column error of {float(self.error):.2e} after "
            f"{int(self.iterations)} sweeps, above the tolerance {self.tolerance:.0e}: "
            "raise max_iterations, the tolerance or the entropy"
        )

    def check(self) -> Solution:
        """Return the solution itself.

        Raises:
            RuntimeError: it did not converge. Reads from the device.
        """
        if self.result:
            raise RuntimeError(self.result)
        return self


@dataclass(frozen=True)
class Rows:
    """The tokens of one problem on this rank, ready for sweeps."""

    scaled_TE: Tensor
    """`C / xi`, fp32 or fp64; zero in rows left out."""
    weight_T: Tensor
    """1 for a token that takes part, 0 for one left out."""
    target: Tensor
    """`s`, the column sum asked for, over all ranks; 0-dim."""
    reduce: Sum | None

    def columns(self, potential_E: Tensor) -> Tensor:
        """Column sums `c [E]` over all ranks of the plan at `h = g / xi`; at least the smallest normal."""
        log_plan_TE = torch.log_softmax(self.scaled_TE + potential_E, dim=1)
        column_E = torch.logsumexp(log_plan_TE + self.weight_T.log().unsqueeze(1), dim=0).double().exp()
        if self.reduce is not None:
            column_E = self.reduce(column_E)
        return column_E.clamp_min(torch.finfo(torch.float64).tiny)


def prepare(scores: Tensor, entropy: float, mask: Tensor | None, reduce: Sum | None) -> Rows:
    """Check and scale a problem.

    Rows with a NaN or an infinity are left out, so that one bad token does not spoil the
    potentials of all others.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must be [tokens, experts], got shape {tuple(scores.shape)}")
    if not entropy > 0:
        raise ValueError(f"entropy = {entropy!r}; allowed: above 0")
    tokens, experts = scores.shape
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    taking_part = torch.isfinite(scores).all(dim=1)
    if mask is not None:
        if mask.numel() != tokens:
            raise ValueError(f"mask has {mask.numel()} entries for {tokens} tokens")
        taking_part = taking_part & (mask.reshape(-1) != 0)
    weight_T = taking_part.to(scores.dtype)
    count = weight_T.sum(dtype=torch.float64)
    if reduce is not None:
        count = reduce(count)
    scaled_TE = torch.where(taking_part.unsqueeze(1), scores, 0.0) / entropy
    return Rows(scaled_TE, weight_T, count.clamp_min(1.0) / experts, reduce)


def readable(tensor: Tensor) -> bool:
    """Whether the host may read a tensor's value for free: on the CPU, neither traced nor fake."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()
