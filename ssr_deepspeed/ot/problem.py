"""The transport problem between tokens and experts, and what a solver returns.

    maximise  <P, C> - xi <P, log P>   over P > 0,  sum_j P_ij = 1,  sum_i P_ij = s = T / E

with compatibility `C [T, E]` and entropy weight `xi` (arXiv 2511.08972). Its solution is
`P_ij = softmax_j((C_ij + g_j) / xi)`: one expert potential `g_j` per expert says it all, and the
`T x E` plan need never be stored. Tokens that a mask leaves out belong to no sum and not to `T`.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
"""Sum of a tensor over the ranks that share one problem; called equally often on each of them."""


# In units of the entropy. Far beyond what any exponential resolves, and sums of them stay finite.
_FARTHEST = 1e30


class Outcome:
    """What the records of all solvers share: a marginal error, and the one asked for."""

    error: Tensor
    tolerance: float

    @property
    def converged(self) -> Tensor:
        """Whether the error is within the tolerance, a 0-dim bool tensor."""
        return self.error <= self.tolerance

    @property
    def result(self) -> str:
        """Empty when converged, else a sentence with cause and remedy. Reads from the device."""
        raise NotImplementedError

    def check(self) -> Self:
        """Return the solution itself.

        Raises:
            RuntimeError: it did not converge. Reads from the device.
        """
        if self.result:
            raise RuntimeError(self.result)
        return self


@dataclass(frozen=True)
class Solution(Outcome):
    """Expert potentials and how good they are. Nothing in it has been read by the host yet."""

    potentials: Tensor
    """`g [E]`, mean zero, in units of the scores; fp32, or fp64 for fp64 scores."""
    error: Tensor
    """Relative column error `max_j |c_j - s| / s` of these potentials, a 0-dim tensor."""
    iterations: Tensor
    """Sweeps and Newton steps that changed the potentials, a 0-dim int64 tensor."""
    tolerance: float
    """The error asked for."""

    @property
    def result(self) -> str:
        if bool(self.converged):
            return ""
        return (
            f"the transport problem was left at a relative column error of {float(self.error):.2e} after "
            f"{int(self.iterations)} iterations, above the tolerance {self.tolerance:.0e}: "
            "raise max_iterations, the tolerance or the entropy"
        )


@dataclass(frozen=True)
class Rows:
    """The tokens of one problem on this rank, and the column sums asked for over all ranks."""

    scores_TE: Tensor
    """`C`, fp32 or fp64, without gradient; zero in rows left out."""
    highest_T: Tensor
    """Largest score of each row."""
    spread: Tensor
    """Largest difference within any row of this rank, 0-dim."""
    weight_T: Tensor
    """1 for a token that takes part, 0 for one left out."""
    count: Tensor
    """Tokens that take part on all ranks, 0-dim fp64, at least 1."""
    target: Tensor
    """`s = T / E`."""
    blank: Tensor
    """`s` if no token takes part, else 0: what columns then are, so that there is nothing to solve."""
    reduce: Sum | None
    rare: bool = False
    """Whether the solve is not one of every step, so that the host may wait for an accelerator."""

    def scaled(self, potential_E: Tensor, entropy: float | Tensor) -> Tensor:
        """`(C + g) / xi [T, E]` up to a constant for each row, which no plan knows: near 0 at the largest score.

        Without the constant nothing is lost to a row's offset, and nothing becomes infinite.
        """
        scaled_TE = (self.scores_TE - self.highest_T.unsqueeze(1)).add_(potential_E)
        return scaled_TE.div_(entropy).clamp_(-_FARTHEST, _FARTHEST)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in fp64; one collective."""
        return tensor.double() if self.reduce is None else self.reduce(tensor.double())

    def ended(self, done: Tensor, turn: int, every: int) -> bool:
        """Whether to leave the iteration, on all ranks: `ended`, but on an accelerator only in a rare solve."""
        return (self.rare or readable(done)) and ended(done, turn, every, self.reduce)


def prepare(scores: Tensor, entropy: float, mask: Tensor | None, reduce: Sum | None, rare: bool = False) -> Rows:
    """Check a problem and set up its rows; one call of `reduce`, for the number of tokens.

    Rows with a NaN or an infinity are left out, so that one bad token does not spoil the
    potentials of all others.
    """
    if scores.dim() != 2 or not scores.shape[1]:
        raise ValueError(f"scores must be [tokens, experts], got shape {tuple(scores.shape)}")
    if not 0 < entropy < math.inf:
        raise ValueError(f"entropy = {entropy!r}; allowed: above 0 and finite")
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    # Two reductions see every NaN and infinity of a row, with nothing of the size T x E written.
    highest_T, lowest_T = scores.amax(dim=1), scores.amin(dim=1)
    taking_part_T = torch.isfinite(highest_T) & torch.isfinite(lowest_T)
    if mask is not None:
        if mask.numel() != scores.shape[0]:
            raise ValueError(f"mask has {mask.numel()} entries for {scores.shape[0]} tokens")
        taking_part_T = taking_part_T & (mask.reshape(-1) != 0)
    if not readable(taking_part_T) or not taking_part_T.all():
        scores = torch.where(taking_part_T.unsqueeze(1), scores, 0.0)
        highest_T = torch.where(taking_part_T, highest_T, 0.0)
        lowest_T = torch.where(taking_part_T, lowest_T, 0.0)
    weight_T = taking_part_T.to(scores.dtype)
    count = weight_T.sum(dtype=torch.float64)
    if reduce is not None:
        count = reduce(count)
    spread = torch.cat([highest_T - lowest_T, highest_T.new_zeros(1)]).max()
    some = count.clamp_min(1.0)
    target = some / scores.shape[1]
    return Rows(scores, highest_T, spread, weight_T, some, target, target * (count < 1), reduce, rare)


def start_at(initial: Tensor | None, rows: Rows) -> Tensor:
    """Potentials to start from, fp64, mean zero: an offset would cost the scores their digits.

    Raises:
        ValueError: not one potential an expert.
    """
    experts = rows.scores_TE.shape[1]
    if initial is None:
        return torch.zeros(experts, dtype=torch.float64, device=rows.scores_TE.device)
    if initial.shape != (experts,):
        raise ValueError(f"initial must have shape ({experts},), got {tuple(initial.shape)}")
    initial_E = initial.detach().double()
    return initial_E - initial_E.mean()


def positive(column_E: Tensor) -> Tensor:
    """Column sums kept above zero, so that they have a logarithm."""
    return column_E.clamp_min(torch.finfo(torch.float64).tiny)


def readable(tensor: Tensor) -> bool:
    """Whether the host may read a tensor's value for free: on the CPU, neither traced nor fake."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def ended(done: Tensor, turn: int, every: int, reduce: Sum | None = None) -> bool:
    """Whether to leave a loop whose further turns change nothing: they would be launched all the same.

    On an accelerator the host waits for the device, so it looks at the last of each `every` turns, and only solves
    that not every step makes may ask. Where a graph is traced or captured nobody looks, and all turns are run.

    Args:
        done: bool, of any shape; all of it must be set.
        turn: from 0.
        every: turns between two looks on an accelerator; on the CPU each turn looks.
        reduce: of a loop with collectives, called once a look on an accelerator. Its ranks must leave together, and
            what they make of equal sums may differ in the last digit between devices.
    """
    if readable(done):
        return bool(done.all())
    if (turn + 1) % every or torch.compiler.is_compiling() or type(done) is not Tensor:
        return False
    if done.is_meta or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return False
    done = done.all()
    return bool(done if reduce is None else reduce((~done).double()) == 0)
