"""Rules that solve for fresh potentials: `ssr`, `capacity` and S-BASE.

On a transport step the potentials are those of the batch itself; other steps are plain softmax.
Which steps are transport steps the coin says, or the imbalance of the step before.

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssr_deepspeed.config import SSRConfig, Trigger
from ssr_deepspeed.ot import (
    CapacitySolution,
    Solution,
    Sum,
    centred_scores,
    implicit_potentials,
    solve,
    solve_capacity,
)
from ssr_deepspeed.routing.plan import RoutePlan, compatibility
from ssr_deepspeed.routing.ranks import asked_routes, routes_of_each
from ssr_deepspeed.routing.rules import Batch, Choice, Rule, max_violation


def solve_for(
    config: SSRConfig,
    scores_TE: Tensor,
    mask: Tensor | None,
    reduce: Sum | None,
    initial_E: Tensor | None = None,
    *,
    rare: bool = True,
) -> Solution:
    """Solve the transport problem of one batch of tokens, row mass 1, as the configuration says."""
    return solve(
        scores_TE,
        config.xi,
        method=config.solver.name,
        mask=mask,
        tolerance=config.solver.tolerance,
        max_iterations=config.solver.max_iterations,
        initial=initial_E,
        reduce=reduce,
        rare=rare,
    )


def solve_capacity_for(
    config: SSRConfig,
    scores_TE: Tensor,
    k: int,
    mask: Tensor | None,
    reduce: Sum | None,
    initial_E: Tensor | None = None,
) -> CapacitySolution:
    """The same on the k-capacity polytope."""
    return solve_capacity(
        scores_TE,
        config.xi,
        k,
        mask=mask,
        tolerance=config.solver.tolerance,
        max_iterations=config.solver.max_iterations,
        initial=initial_E,
        reduce=reduce,
    )


def weighed(
    choice: Choice, config: SSRConfig, k: int, mask: Tensor | None, reduce: Sum | None, shifts_T: Tensor | None = None
) -> Choice:
    """The choice with the weights and the gradient that the configuration asks for.

    Args:
        choice: potentials and compatibility that choose; the softmax of the logits weighs.
        k: experts a token; one is weighed by the softmax whatever is asked for.
        mask: T entries; zero marks padding.
        reduce: sum over the ranks balanced together, or None for this rank alone.
        shifts_T: row shifts, where the plan is the k-capacity polytope's.
    """
    if config.weighs_by == "softmax":
        return choice
    scores_TE = choice.scores_TE
    assert scores_TE is not None
    if config.plan_gradient == "centred" and k > 1 and scores_TE.requires_grad:
        scores_TE = centred_scores(scores_TE, mask, reduce)
    shifted = config.weighs_by == "shifted"
    return replace(
        choice,
        scores_TE=scores_TE,
        entropy=1.0 if shifted else choice.entropy,
        by_plan=True,
        detach=config.plan_gradient == "detach",
        shifts_T=None if shifted else shifts_T,
    )


class Selective(Rule):
    """`ssr`: most steps softmax, chosen ones by transport; with a trigger, those after an uneven step.

    Source: arXiv 2511.08972.
    """

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        super().__init__(config, experts, width, k, device)
        if isinstance(config.probability, Trigger):
            self.state["imbalance"] = self._zeros()
            self.sums = self._sums(experts)

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if not batch.transport:
            return Choice(logits_TE)
        scores_TE = compatibility(logits_TE, self.config.cost)
        return self._transport(logits_TE, scores_TE, batch)

    def _transport(self, logits_TE: Tensor, scores_TE: Tensor, batch: Batch) -> Choice:
        config = self.config
        reduce = batch.scope()
        solution = solve_for(config, scores_TE, batch.mask, reduce)
        potentials_E = solution.potentials
        if config.plan_gradient == "implicit" and config.weighs_by == "plan":
            potentials_E = implicit_potentials(scores_TE, potentials_E, config.xi, batch.mask, reduce)
        choice = Choice(logits_TE, potentials_E, scores_TE, config.xi, solution=solution)
        return weighed(choice, config, self.k, batch.mask, reduce)

    def observe(self, logits_TE: Tensor, choice: Choice, plan: RoutePlan, batch: Batch) -> None:
        if self.sums is None:
            return
        demand_E = plan.demand_E
        if choice.potentials_E is not None:  # what softmax would have asked for
            experts_TK = torch.topk(logits_TE, self.k, dim=1).indices
            demand_E = routes_of_each(experts_TK, asked_routes(experts_TK, plan.used_T), self.experts)
        self.sums += demand_E

    def commit(self, sums: Tensor, transport: bool) -> None:
        if "imbalance" in self.state:
            self._keep("imbalance", max_violation(sums))


class CapacityPolytope(Selective):
    """`capacity`: transport steps solve the k-capacity polytope, which balances counts as the entropy falls."""

    def _transport(self, logits_TE: Tensor, scores_TE: Tensor, batch: Batch) -> Choice:
        config = self.config
        reduce = batch.scope()
        solution = solve_capacity_for(config, scores_TE, self.k, batch.mask, reduce)
        choice = Choice(logits_TE, solution.potentials, scores_TE, config.xi, solution=solution)
        return weighed(choice, config, self.k, batch.mask, reduce, solution.shifts if self.k < self.experts else None)


class SBase(Rule):
    """`s_base`: the plan selects and the softmax weighs, at every step; evaluation is plain softmax.

    Source: Clark et al., Unified scaling laws for routed language models, arXiv 2202.01169.
    """

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        config = self.config
        scores_TE = compatibility(logits_TE, config.cost).detach()
        solution = solve_for(config, scores_TE, batch.mask, batch.scope(), rare=False)
        return Choice(logits_TE, solution.potentials, scores_TE, config.xi, solution=solution)
