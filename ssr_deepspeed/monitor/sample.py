"""A closer look at one training pass of each router and window.

It tells what counts cannot: how sure the router is, and what the balancing has changed. The softmax's own top-k of
the same logits is the measure: what it would have loaded, and which routes went elsewhere.

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_deepspeed.routing import asked_routes, routes_of_each

# Before the two loads: tokens, tokens with a NaN or an infinity, sum of entropies, sum of -log of the chosen
# experts' probability, routes, routes that the softmax would not have taken, largest potential, samples.
SAMPLED = 8


@dataclass(frozen=True)
class Sample:
    """Sums over one pass, on the device, float64."""

    sums: Tensor
    """`[8]`: see above."""
    before_E: Tensor
    """Routes that the experts would have got by the softmax alone."""
    after_E: Tensor
    """Routes that they were asked to take."""

    def row(self, width: int) -> Tensor:
        """All of it as one row `[8 + 2 width]`, loads padded by zeros to that many experts."""
        row = self.sums.new_zeros(SAMPLED + 2 * width)
        row[:SAMPLED] = self.sums
        row[SAMPLED : SAMPLED + len(self.before_E)] = self.before_E
        row[SAMPLED + width : SAMPLED + width + len(self.after_E)] = self.after_E
        return row


def sample_pass(
    logits_TE: Tensor, experts_TK: Tensor, demand_E: Tensor, used_T: Tensor | None, potential: Tensor | None
) -> Sample:
    """Compare what a pass chose with what the softmax alone would have chosen.

    Args:
        logits_TE: of the router, any dtype.
        experts_TK: chosen experts, -1 for a route without a slot.
        demand_E: routes asked for, without padding.
        used_T: true where a token is none of padding; None: everywhere.
        potential: the largest potential over the entropy, 0-dim; None where there are none.
    """
    logits_TE, experts = logits_TE.float(), logits_TE.shape[1]
    finite_T = torch.isfinite(logits_TE).all(1)
    spoilt_T = ~finite_T if used_T is None else ~finite_T & used_T
    counted_T = finite_T if used_T is None else finite_T & used_T
    logits_TE = torch.where(counted_T.unsqueeze(1), logits_TE, 0.0)
    log_TE = logits_TE.log_softmax(1)
    entropy_T = -(log_TE.exp() * log_TE).sum(1)
    own_TK = logits_TE.topk(experts_TK.shape[1], dim=1).indices
    routed_TK = counted_T.unsqueeze(1) & (experts_TK >= 0)
    chosen_TK = experts_TK.clamp_min(0)
    elsewhere_TK = routed_TK & ~(chosen_TK.unsqueeze(2) == own_TK.unsqueeze(1)).any(2)
    mass_T = (log_TE.gather(1, own_TK).exp()).sum(1)
    sums = torch.stack(
        [
            counted_T.sum(),
            spoilt_T.sum(),
            (entropy_T * counted_T).sum(),
            -(mass_T.log() * counted_T).sum(),
            routed_TK.sum(),
            elsewhere_TK.sum(),
            logits_TE.new_zeros(()) if potential is None else potential.double(),
            logits_TE.new_ones(()),
        ]
    )
    before_E = routes_of_each(own_TK, asked_routes(own_TK, counted_T), experts)
    return Sample(sums.double(), before_E.double(), demand_E.double())
