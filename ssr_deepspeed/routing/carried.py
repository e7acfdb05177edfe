"""The rule `carried`: expert potentials kept between optimizer steps.

    select    top k of C + g with the committed potentials g
    weigh     softmax of C + g at the chosen experts (or of the logits, or the plan)
    refresh   g_j += damping * xi * log(mean(c) / c_j), once per optimizer step, c summed over its
              passes and all ranks: one sweep of Sinkhorn on the whole batch of the step

The column sums `c` are those of the plan with row mass 1, `softmax((C + g) / xi)`, or of the k-capacity
plan `sigmoid((C + g - a) / xi)`. On chosen steps each batch's problem is solved to the end from `g`, and the
mean of the solutions, weighed by their tokens, is committed.

With `refresh` `"before"` a pass is routed by what one sweep on its own tokens makes of the committed
potentials: they cannot lag behind a router that changes fast. With `"after"` no token is routed by potentials
that its own batch has set, and a pass needs no collective whatever the scope.

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.ot import Solution, Sum, capacity_columns, plan_columns
from ssr_deepspeed.routing.fresh import solve_capacity_for, solve_for, weighed
from ssr_deepspeed.routing.plan import RoutePlan, compatibility
from ssr_deepspeed.routing.rules import Batch, Choice, Rule

# Of the mean column: a sum of fp32 plans tells no less from nothing. A step is at most 16 entropies.
_LEAST_SHARE = torch.finfo(torch.float32).eps


class Carried(Rule):
    """Potentials kept between steps, refreshed by one sweep on each, solved to the end on chosen ones."""

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        super().__init__(config, experts, width, k, device)
        self.state["potentials"] = self._zeros(experts)
        # Column sums, or solved potentials weighed by their tokens, and how many tokens.
        self.sums = self._sums(experts + 1)
        self._counts = config.carried.polytope == "capacity"
        # Every token asks every expert: nothing to balance.
        self._takes_all = self._counts and k == experts

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        choice, reduce = self._committed(logits_TE), batch.scope()
        scores_TE = choice.scores_TE
        assert scores_TE is not None
        if self.config.carried.refresh == "before" and not self._takes_all:
            if batch.transport:
                solution = self._solve(scores_TE, batch.mask, reduce)
                choice = replace(choice, potentials_E=solution.potentials, solution=solution)
            else:
                column_E = self._columns(scores_TE, batch.mask)
                potentials_E = self._swept(column_E if reduce is None else reduce(column_E)).float()
                choice = replace(choice, potentials_E=potentials_E, column_E=column_E)
        return self._weighed(choice, batch.mask, reduce)

    def choose_frozen(self, logits_TE: Tensor) -> Choice:
        if not self.config.eval_potentials:
            return Choice(logits_TE)
        return self._weighed(self._committed(logits_TE), None, None)

    def _committed(self, logits_TE: Tensor) -> Choice:
        """Routes by the committed potentials."""
        scores_TE = compatibility(logits_TE, self.config.cost)
        # A copy: the state changes in place, and a backward pass may come after that.
        return Choice(logits_TE, self.state["potentials"].clone(), scores_TE, self.config.xi)

    def _weighed(self, choice: Choice, mask: Tensor | None, reduce: Sum | None) -> Choice:
        shifts_T = None
        if self.config.weighs_by == "plan" and self._counts and not self._takes_all:
            assert choice.scores_TE is not None and choice.potentials_E is not None
            _, shifts_T = capacity_columns(choice.scores_TE, self.config.xi, self.k, choice.potentials_E)
        return weighed(choice, self.config, self.k, mask, reduce, shifts_T)

    def observe(self, logits_TE: Tensor, choice: Choice, plan: RoutePlan, batch: Batch) -> None:
        assert self.sums is not None and choice.scores_TE is not None
        if self._takes_all:
            return
        if batch.transport:
            solution = choice.solution or self._solve(choice.scores_TE, batch.mask, batch.scope())
            tokens = plan.tokens()
            self.sums[:-1] += tokens * solution.potentials
            self.sums[-1] += tokens
        else:
            column_E = choice.column_E
            self.sums[:-1] += self._columns(choice.scores_TE, batch.mask) if column_E is None else column_E

    def commit(self, sums: Tensor, transport: bool) -> None:
        self._keep("potentials", sums[:-1] / sums[-1] if transport else self._swept(sums[:-1]))

    def _columns(self, scores_TE: Tensor, mask: Tensor | None) -> Tensor:
        """Column sums of this rank's pass at the committed potentials."""
        potentials_E = self.state["potentials"]
        if self._counts:
            return capacity_columns(scores_TE, self.config.xi, self.k, potentials_E, mask=mask)[0]
        return plan_columns(scores_TE, self.config.xi, potentials_E, mask=mask)

    def _swept(self, column_E: Tensor) -> Tensor:
        """The committed potentials, fp64, after one damped sweep with these column sums."""
        config, old_E = self.config, self.state["potentials"].double()
        sign = 1
        if self._counts and 2 * self.k > self.experts:
            # Many choices: the few experts that a token leaves out say more.
            column_E, sign = column_E.sum() / self.k - column_E, -1
        share_E = (column_E / column_E.mean()).clamp_min(_LEAST_SHARE)
        moved_E = old_E - sign * config.carried.damping * config.xi * share_E.log()
        # A pass of padding alone has no shares.
        return torch.where(torch.isfinite(moved_E).all(), moved_E - moved_E.mean(), old_E)

    def _solve(self, scores_TE: Tensor, mask: Tensor | None, reduce: Sum | None) -> Solution:
        initial_E = self.state["potentials"]
        if self._counts:
            return solve_capacity_for(self.config, scores_TE, self.k, mask, reduce, initial_E)
        return solve_for(self.config, scores_TE, mask, reduce, initial_E)
