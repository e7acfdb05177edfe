"""What a balancing rule is: how a router's logits become routes. The gate knows nothing else about it.

    choose     logits -> potentials and how they enter selection and weights (a `Choice`)
    loss       what the host is to add to the training loss, if the rule works by one
    observe    sums over a training pass, kept beside the committed state
    commit     once per optimizer step: the sums over all passes and ranks make the next state

Every pass of a step reads the same committed state, so neither recomputation nor the order of
micro-batches changes a route, and all ranks hold the same state. In evaluation nothing is observed.

Shapes: T tokens, E experts, K choices a token, M model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.ot import Solution, Sum
from ssr_deepspeed.routing.plan import RoutePlan


@dataclass(frozen=True)
class Batch:
    """What a pass knows beside its logits."""

    input_TM: Tensor | None
    """The gate's input, engine dtype; None where only logits were given."""
    mask: Tensor | None
    """T entries; zero marks padding."""
    transport: bool
    """Whether the coin, or a trigger, made this a transport step."""
    recomputed: bool
    """Whether backward repeats a checkpointed pass, which has been observed before."""
    scope: Callable[[], Sum | None]
    """Gives the sum over the ranks balanced together, None for this rank alone."""
    everyone: Callable[[], Sum | None]
    """Gives the sum over all data-parallel ranks."""


@dataclass(frozen=True)
class Choice:
    """How one pass routes: what `route` is called with."""

    logits_TE: Tensor
    """With noise, if the rule adds any."""
    potentials_E: Tensor | None = None
    """None: plain softmax routing."""
    scores_TE: Tensor | None = None
    """Compatibility that the potentials belong to; None: the logits."""
    entropy: float = 1.0
    by_plan: bool = False
    """Whether the plan weighs the chosen experts, or the softmax of the logits."""
    detach: bool = False
    """Give the plan's weights no gradient."""
    shifts_T: Tensor | None = None
    """Row shifts of a k-capacity plan that weighs."""
    solution: Solution | None = None
    """Of a transport problem solved for this pass, for the monitor."""
    column_E: Tensor | None = None
    """Column sums of this rank's pass, where choosing took them already."""


class Rule:
    """A balancing rule without state, and the parts that rules with state fill in.

    Args:
        config: the settings.
        experts: E.
        width: M, of the gate's input.
        k: experts a token.
        device: where the gate runs.
    """

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        self.config, self.experts, self.width, self.k, self.device = config, experts, width, k, device
        self.state: dict[str, Tensor] = {}
        """What is committed, by name: fp32, the same on all ranks, saved with the engine's checkpoints."""
        self.sums: Tensor | None = None
        """fp64, what the passes of this optimizer step have observed; None if the rule observes nothing."""

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        """How a training pass routes."""
        return Choice(logits_TE)

    def choose_frozen(self, logits_TE: Tensor) -> Choice:
        """How evaluation routes: plain softmax."""
        return Choice(logits_TE)

    def loss(self, logits_TE: Tensor, plan: RoutePlan, batch: Batch) -> Tensor | None:
        """What the host is to add to its training loss with a weight of its own, 0-dim; None for nothing."""
        return None

    def observe(self, logits_TE: Tensor, choice: Choice, plan: RoutePlan, batch: Batch) -> None:
        """Add one training pass to `sums`, in place. Called without gradient, never in a recomputation."""

    def gather(self, loss_scale: float = 1.0) -> None:
        """Add to `sums` what is known only when a step's passes are over; called once before `commit`.

        Args:
            loss_scale: what the gradients of this step are multiplied by.
        """

    def commit(self, sums: Tensor, transport: bool) -> None:
        """Make the next state of the sums over all passes and ranks of a step.

        Args:
            sums: like `self.sums`.
            transport: whether it was a transport step.
        """

    def take(self, state: dict[str, Tensor]) -> None:
        """Take over another rule's state, of the same names and shapes, on whatever device."""
        with torch.no_grad():
            for name, value in self.state.items():
                value.copy_(state[name])

    def _keep(self, name: str, value: Tensor) -> None:
        """Commit `value` where all of it is finite; a pass without tokens or with a NaN changes nothing."""
        old = self.state[name]
        old.copy_(torch.where(torch.isfinite(value).all(), value.to(old), old))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _sums(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.device)


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio, `max l / m - 1` over the last dimension; NaN where nothing was routed (arXiv 2408.15664)."""
    return load_E.amax(dim=-1) / load_E.mean(dim=-1) - 1
