"""Rules that solve for fresh potentials: `ssr`, `capacity` and S-BASE.

On a transport step the potentials are those of the batch itself; other steps are plain softmax.
Which steps are transport steps the coin says, or the imbalance of the step before.

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssr_deepspeed.config import SSRConfig, Trigger
from ssr_deepspeed.ot import Solution, Sum, implicit_potentials, solve, solve_capacity
from ssr_deepspeed.routing.plan import RoutePlan, compatibility
from ssr_deepspeed.routing.ranks import asked_routes, routes_of_each
from ssr_deepspeed.routing.rules import Batch, Choice, Rule, max_violation


def transport_potentials(
    scores: Tensor, config: SSRConfig, mask: Tensor | None, reduce: Sum | None
) -> tuple[Tensor, Solution]:
    """Solve the transport problem of one batch of tokens.

    Args:
        scores: compatibility `C [T, E]`, with its graph.
        config: entropy, solver and gradient.
        mask: T entries; zero marks padding, which takes no part.
        reduce: sum over the ranks balanced together, or None for this rank alone.

    Returns:
        The potentials `g [E]`, differentiable if the gradient is `"implicit"`, and the solution.
    """
    solution = solve(
        scores,
        config.xi,
        method=config.solver.name,
        mask=mask,
        tolerance=config.solver.tolerance,
        max_iterations=config.solver.max_iterations,
        reduce=reduce,
    )
    potentials_E = solution.potentials
    if config.gradient == "implicit" and config.weighs_by_plan:
        potentials_E = implicit_potentials(scores, potentials_E, config.xi, mask, reduce)
    return potentials_E, solution


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
        potentials_E, solution = transport_potentials(scores_TE, config, batch.mask, batch.scope())
        return Choice(
            logits_TE,
            potentials_E,
            scores_TE,
            config.xi,
            by_plan=config.weighs_by_plan,
            detach=config.gradient == "detach",
            solution=solution,
        )

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
        solution = solve_capacity(
            scores_TE,
            config.xi,
            self.k,
            mask=batch.mask,
            tolerance=config.solver.tolerance,
            max_iterations=config.solver.max_iterations,
            reduce=batch.scope(),
        )
        by_plan = config.weighs_by_plan and self.k < self.experts
        return Choice(
            logits_TE,
            solution.potentials,
            scores_TE,
            config.xi,
            by_plan=by_plan,
            detach=config.gradient == "detach",
            shifts_T=solution.shifts if by_plan else None,
            solution=solution,
        )


class SBase(Rule):
    """`s_base`: the plan selects and the softmax weighs, at every step; evaluation is plain softmax.

    Source: Clark et al., Unified scaling laws for routed language models, arXiv 2202.01169.
    """

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        config = self.config
        scores_TE = compatibility(logits_TE, config.cost).detach()
        solution = solve(
            scores_TE,
            config.xi,
            method=config.solver.name,
            mask=batch.mask,
            tolerance=config.solver.tolerance,
            max_iterations=config.solver.max_iterations,
            reduce=batch.scope(),
        )
        return Choice(logits_TE, solution.potentials, scores_TE, config.xi, solution=solution)
