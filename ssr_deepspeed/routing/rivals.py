"""Other routers' rules, under the same dispatch, capacity, counting and monitoring, to compare with.

Each is written down from its formula, see the source beside it.

Shapes: T tokens, E experts, K choices a token, M model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.routing.plan import RoutePlan, compatibility
from ssr_deepspeed.routing.rules import Batch, Choice, Rule


class AuxiliaryLoss(Rule):
    """`auxiliary`: `E sum_j f_j P_j`, f the share of routes of this rank's pass, P the mean softmax.

    1 where both are even. The host weighs it, usually with 0.01.
    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, equation 4, for k choices.
    """

    def loss(self, logits_TE: Tensor, plan: RoutePlan, batch: Batch) -> Tensor:
        demand_E = self._demand(plan, batch)
        share_E = demand_E / demand_E.sum().clamp_min(1)
        return self.experts * (share_E * _mean(torch.softmax(logits_TE, dim=1), plan.used_T)).sum()

    def _demand(self, plan: RoutePlan, batch: Batch) -> Tensor:
        return plan.demand_E.float()


class GlobalAuxiliaryLoss(AuxiliaryLoss):
    """`global_auxiliary`: the same with f over all data-parallel ranks and this step's passes so far.

    One collective a pass. Source: Qiu et al., Demons in the detail, arXiv 2501.11873.
    """

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        super().__init__(config, experts, width, k, device)
        self.sums = self._sums(experts)

    def _demand(self, plan: RoutePlan, batch: Batch) -> Tensor:
        assert self.sums is not None
        demand_E = self.sums.float()
        if not batch.recomputed:  # else it has been observed
            demand_E = demand_E + plan.demand_E
        total = batch.everyone()
        return demand_E if total is None else total(demand_E)

    def observe(self, logits_TE: Tensor, choice: Choice, plan: RoutePlan, batch: Batch) -> None:
        assert self.sums is not None
        self.sums += plan.demand_E


class ZLoss(Rule):
    """`z`: the mean of `log(sum_j exp Z_ij)^2`, which keeps logits small. The host weighs it, usually with 0.001.

    Source: Zoph et al., ST-MoE, arXiv 2202.08906, equation 5.
    """

    def loss(self, logits_TE: Tensor, plan: RoutePlan, batch: Batch) -> Tensor:
        return _mean(torch.logsumexp(logits_TE, dim=1).square(), plan.used_T)


class NoisyTopK(Rule):
    """`noisy`: `Z + N softplus(x W)`, N standard normal, with a trained W; evaluation without noise.

    W belongs to the rule and not to the module, whose state dict is the host's; it starts at zero and is
    trained here by Adam with learning rate `rate`, on the mean gradient over ranks, which the engine does not clip.
    Source: Shazeer et al., Outrageously large neural networks, arXiv 1701.06538, equations 3 to 5, without
    their two losses.
    """

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        super().__init__(config, experts, width, k, device)
        self._noise_EM = self._zeros(experts, width).requires_grad_()
        self._adam = torch.optim.Adam([self._noise_EM], lr=config.rate)
        # Adam reads its steps on the host: on the CPU that waits for no device.
        self.state = {
            "noise": self._noise_EM,
            "mean": self._zeros(experts, width),
            "square": self._zeros(experts, width),
            "steps": torch.zeros((), device="cpu"),
        }
        self._adam.state[self._noise_EM] = {
            "step": self.state["steps"],
            "exp_avg": self.state["mean"],
            "exp_avg_sq": self.state["square"],
        }
        # The gradient, and the number of ranks it is summed over.
        self.sums = self._sums(experts * width + 1)

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if batch.input_TM is None:
            raise ValueError('rule "noisy" needs the input of the gate: call the gate itself, not routes_of on logits')
        # Autograd leaves the gradient in `_noise_EM.grad`; `gather` fetches it.
        scale_TE = torch.nn.functional.softplus(torch.nn.functional.linear(batch.input_TM.float(), self._noise_EM))
        return Choice(logits_TE + torch.randn_like(logits_TE) * scale_TE)

    def gather(self, loss_scale: float = 1.0) -> None:
        assert self.sums is not None
        if self._noise_EM.grad is not None:
            self.sums[:-1] += self._noise_EM.grad.flatten() / loss_scale
            self._noise_EM.grad = None
        self.sums[-1] += 1

    def commit(self, sums: Tensor, transport: bool) -> None:
        gradient_EM = (sums[:-1] / sums[-1]).view_as(self._noise_EM)
        gradient_EM = torch.where(torch.isfinite(gradient_EM).all(), gradient_EM, 0.0)
        self._noise_EM.grad = gradient_EM.to(self._noise_EM)
        self._adam.step()
        self._noise_EM.grad = None


class Biased(Rule):
    """A bias for each expert, kept between steps, that selects together with the softmax; the softmax weighs."""

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        super().__init__(config, experts, width, k, device)
        self.state["bias"] = self._zeros(experts)

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        return self._biased(logits_TE)

    def choose_frozen(self, logits_TE: Tensor) -> Choice:
        return self._biased(logits_TE) if self.config.eval_potentials else Choice(logits_TE)

    def _biased(self, logits_TE: Tensor) -> Choice:
        return Choice(logits_TE, self.state["bias"].clone(), compatibility(logits_TE, "softmax").detach())


class LossFreeBias(Biased):
    """`loss_free`: `b_j += rate * sign(mean load - load_j)` once per optimizer step, load over all ranks.

    Source: Wang et al., Auxiliary-loss-free load balancing, arXiv 2408.15664, algorithm 1, with the softmax as score.
    """

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        super().__init__(config, experts, width, k, device)
        self.sums = self._sums(experts)

    def observe(self, logits_TE: Tensor, choice: Choice, plan: RoutePlan, batch: Batch) -> None:
        assert self.sums is not None
        self.sums += plan.demand_E

    def commit(self, sums: Tensor, transport: bool) -> None:
        self._keep("bias", self.state["bias"] + self.config.rate * torch.sign(sums.mean() - sums))


class QuantileBalancing(Biased):
    """`quantile`: the bias at which each expert would have taken its share of this pass.

    With `a_i` the (k + 1)-th largest of `s_i + b`, `-b_j` becomes the `(k T / E + 1)`-th largest of `s_.j - a`. The
    biases of a step's passes and ranks are averaged, weighed by their tokens.
    Source: kexue.fm 11619 (there with the opposite sign of b).
    """

    def __init__(self, config: SSRConfig, experts: int, width: int, k: int, device: torch.device) -> None:
        super().__init__(config, experts, width, k, device)
        # Biases weighed by the tokens of their pass, and how many tokens.
        self.sums = self._sums(experts + 1)

    def observe(self, logits_TE: Tensor, choice: Choice, plan: RoutePlan, batch: Batch) -> None:
        assert self.sums is not None and choice.scores_TE is not None and choice.potentials_E is not None
        if self.k == self.experts or not len(logits_TE):
            return
        scores_TE = choice.scores_TE
        threshold_T = torch.topk(scores_TE + choice.potentials_E, self.k + 1, dim=1).values[:, -1]
        beyond_ET = (scores_TE - threshold_T.unsqueeze(1)).t()
        tokens = len(logits_TE)
        if plan.used_T is None:
            share = min(self.k * tokens // self.experts, tokens - 1)
            bias_E = -torch.topk(beyond_ET, share + 1, dim=1).values[:, -1]
            self.sums[:-1] += tokens * bias_E
            self.sums[-1] += tokens
            return
        used = plan.used_T.sum()
        sorted_ET = beyond_ET.masked_fill(~plan.used_T, -torch.inf).sort(dim=1, descending=True).values
        place = torch.minimum(self.k * used // self.experts, used - 1).clamp_min(0)
        bias_E = -sorted_ET.index_select(1, place.reshape(1)).squeeze(1)
        self.sums[:-1] += torch.where(used > 0, used * bias_E, 0.0)
        self.sums[-1] += used

    def commit(self, sums: Tensor, transport: bool) -> None:
        self._keep("bias", sums[:-1] / sums[-1])


def _mean(value_T: Tensor, used_T: Tensor | None) -> Tensor:
    """The mean over the tokens in use, along the first dimension; 0 without any."""
    if used_T is None:
        return value_T.sum(0) / max(len(value_T), 1)
    used_TX = used_T if value_T.dim() == 1 else used_T.unsqueeze(1)
    return torch.where(used_TX, value_T, 0.0).sum(0) / used_T.sum().clamp_min(1)
