"""`SSRGate`: Selective Sinkhorn Routing behind the contract of DeepSpeed's `TopKGate`.

It is a `TopKGate` (the engine finds gates with `isinstance`, checkpoints match `moe.gate.wg.weight`)
with the same parameter and no other state: `TopKGate` checkpoints load into it strictly, and back.

    logits [T,E] -> potentials [E] (the balancing rule) -> routes [T,K] -> slots [T,K] -> host's tuple

What differs from `TopKGate`, for every k: the auxiliary loss is zero (except under a rule that works by
a loss), evaluation is deterministic, padding (`used_token`) is never routed, and an expert that
overflows keeps its most probable routes. `TopKGate`'s own random choices (`noisy_gate_policy`,
`use_rts`, `top2_2nd_expert_sampling`) play no part; noise is the configuration's.

Tested with deepspeed 0.19.8, and with the dense contract in 0.16.9 and 0.19.3. Not run here: Tutel
and tensor parallelism.

Shapes: T tokens, E experts, K choices a token, C capacity, M model width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TOPK_GATE_TIMER, TopKGate
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import Tensor

from ssr_deepspeed.collectives import maximum_over, sum_over
from ssr_deepspeed.config import Scope, SSRConfig, Trigger
from ssr_deepspeed.ot import Solution
from ssr_deepspeed.routing import (
    Batch,
    RoutePlan,
    Rule,
    Slots,
    expert_capacity,
    fill_slots,
    is_transport_step,
    make_rule,
    route,
    routes_of_each,
    surviving_weights,
)

# Since 0.19.4 the third positional argument asks for sparse routes; before, it was `use_tutel`.
HOST_HAS_SPARSE_ROUTES = "sparse_routes" in inspect.signature(TopKGate.forward).parameters


@dataclass
class GateState:
    """What a gate needs beside its weight. Plain Python: never part of a state dict."""

    config: SSRConfig
    rule: Rule
    """The balancing rule with what it has committed."""
    layer: int = 0
    """Index among all routers of the whole model."""
    transport: bool = False
    """Whether training passes of this optimizer step route by transport."""
    solution: Solution | None = None
    """Of the last training pass; None if it solved nothing."""
    loss_reached: Tensor | None = None
    """Whether a gradient other than zero has come back through the `l_aux` of a rule that works by a loss, 0-dim
    bool; None before a training pass has asked for one."""
    nonfinite: Tensor | None = None
    """Whether a training pass since the last check met a NaN or an infinity in the logits, 0-dim bool that
    passes change in place. None: nobody asks."""
    dispatched_E: Tensor | None = None
    """int64 `[E]`, routes of the last pass that got a slot, where routes are moved; else None."""
    data_parallel_group: Any = field(default=None, repr=False)

    def group(self, scope: Scope, expert_parallel_group: Any) -> Any:
        """The process group of that scope; None for this rank alone.

        Raises:
            RuntimeError: the scope needs a group that the gate was not given.
        """
        if scope == "rank":
            return None
        group = expert_parallel_group if scope == "expert_parallel" else self.data_parallel_group
        if group is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f'rule "{self.config.rule}" balances over the {scope} group, but this gate has none: '
                'give it one, let a DeepSpeed engine set it up, or use ssr.scope "rank"'
            )
        return group


class SSRGate(TopKGate):
    """A `TopKGate` that routes by transport on chosen steps.

    Args:
        *args, **kwargs: `TopKGate`'s own.
        config: the settings; default `SSRConfig()`.
        layer: index among all routers of the model, for coins by layer.
        data_parallel_group: process group for `scope = "data_parallel"`; an engine gives its own.
    """

    ssr: GateState

    def __init__(
        self,
        *args: Any,
        config: SSRConfig | None = None,
        layer: int = 0,
        data_parallel_group: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._begin(config or SSRConfig(), layer, data_parallel_group)

    def _begin(self, config: SSRConfig, layer: int, data_parallel_group: Any) -> None:
        rule = make_rule(config, self.wg.weight, self.k)
        self.ssr = GateState(config, rule, layer, data_parallel_group=data_parallel_group)
        self.set_step(0)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, for `to`, `cuda` and the like; what the rule keeps follows the weight, in fp32."""
        result = super()._apply(*args, **kwargs)
        old = self.ssr.rule
        if old.device != self.wg.weight.device:
            self.renew_rule()
            if old.device.type != "meta":
                self.ssr.rule.take(old.state)
        return result

    def renew_rule(self) -> None:
        """Begin the balancing rule anew, with its initial state."""
        self.ssr.rule = make_rule(self.ssr.config, self.wg.weight, self.k)

    @staticmethod
    def refusal(gate: TopKGate) -> str | None:
        """Why a gate cannot be replaced, as a sentence, or None when it can."""
        if type(gate) not in (TopKGate, SSRGate):
            return f"{type(gate).__qualname__} is a gate of its own kind: SSR replaces only TopKGate itself"
        experts = gate.wg.weight.shape[0]
        if "forward" in vars(gate):
            return (
                "the gate has a forward of its own (set on the instance, as accelerate's hooks do), which would "
                "shadow SSR: remove that hook before the engine is built"
            )
        if not 1 <= gate.k <= experts:
            return f"k = {gate.k} experts a token out of {experts}; allowed: 1 to {experts}"
        return None

    @classmethod
    def adopt(cls, gate: TopKGate, config: SSRConfig, layer: int, data_parallel_group: Any = None) -> SSRGate:
        """Turn a `TopKGate` into an `SSRGate` in place: the parameter, its name and all hooks stay.

        Raises:
            ValueError: the gate cannot be replaced; see `refusal`.
        """
        reason = cls.refusal(gate)
        if reason:
            raise ValueError(reason)
        gate.__class__ = cls
        assert isinstance(gate, cls)
        gate._begin(config, layer, data_parallel_group)
        return gate

    def release(self) -> TopKGate:
        """Turn the gate back into the `TopKGate` it was, in place."""
        del self.ssr
        self.__class__ = TopKGate
        return self

    def set_step(self, step: int) -> None:
        """Toss the coin for optimizer step `step` (steps taken before it).

        The install seam calls it when `engine.global_steps` changes; without an engine, call it. Where a
        trigger decides, it says nothing.
        """
        if not isinstance(self.ssr.config.probability, Trigger):
            self.ssr.transport = is_transport_step(self.ssr.config, step, self.ssr.layer)

    def commit(self) -> None:
        """End an optimizer step of one process without an engine; an engine's `RuleStates` does it over its ranks."""
        rule = self.ssr.rule
        rule.gather()
        if rule.sums is not None:
            rule.commit(rule.sums, self.ssr.transport)
            rule.sums.zero_()
        if isinstance(self.ssr.config.probability, Trigger) and "imbalance" in rule.state:
            self.ssr.transport = bool(rule.state["imbalance"] > self.ssr.config.probability.imbalance)

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        """Route a batch of tokens.

        Args:
            input: `[T, M]`, engine dtype; the logits are computed in fp32.
            used_token: T entries of any shape and dtype, zero for padding; None for no padding.
            sparse_routes: the return form, see below. On deepspeed before 0.19.4 this position is
                `use_tutel`, whose form is the sparse one with lists in place of stacked tensors.
            use_tutel: accepted; the routes are the same.

        Returns:
            Sparse: `(l_aux, C, E, indices, locations, gates, exp_counts)` with int32 `[K, T]`
            indices (-1: no slot) and locations, fp32 `[K, T]` gates. Dense: `(l_aux, combine,
            dispatch_mask, exp_counts)`, both `[T, E, C]`. `l_aux` is the rule's loss, or an exact zero that
            carries a graph; `exp_counts` int64 `[E]` is the demand before capacity.

        Raises:
            ValueError: `used_token` has another number of entries than there are tokens.
        """
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).start()
        with torch.autocast(input.device.type, enabled=False):
            logits_TE = torch.nn.functional.linear(input.float(), self.wg.weight.float())
            output = self.routes_of(logits_TE, used_token, sparse_routes, input)
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).stop()
            self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return output

    def routes_of(
        self, logits_TE: Tensor, used_token: Tensor | None, sparse_routes: bool, input_TM: Tensor | None = None
    ) -> tuple[Any, ...]:
        """What `forward` makes of the fp32 logits."""
        if self.training and self.ssr.nonfinite is not None:
            self._watch(logits_TE, self.ssr.nonfinite)
        plan, l_aux = self._plan(logits_TE, used_token, input_TM)
        capacity, slots = self._fill(plan, logits_TE)
        self.ssr.dispatched_E = None
        if plan.placed_TK is not None:
            self.ssr.dispatched_E = routes_of_each(plan.experts_TK, slots.kept_TK, plan.demand_E.shape[0])
        weights_TK = surviving_weights(plan, slots.kept_TK)
        if sparse_routes:
            return _sparse(l_aux, capacity, plan, slots, weights_TK)
        return _dense(l_aux, capacity, plan, slots, weights_TK)

    def _plan(self, logits_TE: Tensor, mask: Tensor | None, input_TM: Tensor | None) -> tuple[RoutePlan, Tensor]:
        """Routes of this pass by the balancing rule, and the loss that the host adds to its own."""
        config, transport, rule = self.ssr.config, self.ssr.transport, self.ssr.rule
        batch = Batch(
            input_TM,
            mask,
            transport,
            _recomputes(),
            lambda: sum_over(self.ssr.group(config.scope, self.ep_group)),
            lambda: sum_over(self.ssr.group("data_parallel", None)),
        )
        if not self.training:
            choice = rule.choose_frozen(logits_TE)
        else:
            if config.noise_on(transport):
                logits_TE = logits_TE + config.noise.scale * torch.randn_like(logits_TE)
            choice = rule.choose(logits_TE, batch)
        plan = route(
            choice.logits_TE,
            choice.potentials_E,
            k=self.k,
            scores=choice.scores_TE,
            entropy=choice.entropy,
            by_plan=choice.by_plan,
            shifts=choice.shifts_T,
            detach=choice.detach,
            mask=mask,
            capacity=self._capacity(logits_TE) if config.overflow == "next" and self.drop_tokens else None,
        )
        # Carries a graph also where it is zero: pipeline engines start their backward pass from it.
        l_aux = logits_TE[:0].sum()
        if self.training:
            self.ssr.solution = choice.solution
            loss = rule.loss(choice.logits_TE, plan, batch)
            l_aux = l_aux if loss is None else self._asked_for(loss)
            if not batch.recomputed:
                with torch.no_grad():
                    rule.observe(logits_TE, choice, plan, batch)
        return plan, l_aux

    def _asked_for(self, loss: Tensor) -> Tensor:
        """The loss, and a note when a gradient comes back through it: a host may well ignore it."""
        # Under torch.compile no hook can be traced, and nobody is accused on no evidence.
        if loss.requires_grad and not torch.compiler.is_compiling():
            if self.ssr.loss_reached is None:
                self.ssr.loss_reached = torch.zeros((), dtype=torch.bool, device=loss.device)
            loss.register_hook(self._note_gradient)
        return loss

    def _note_gradient(self, gradient: Tensor) -> None:
        if self.ssr.loss_reached is not None:
            self.ssr.loss_reached |= gradient.detach() != 0

    def _watch(self, logits_TE: Tensor, flag: Tensor) -> None:
        """Remember a NaN or an infinity on the device, for whoever drives the steps to ask about."""
        if logits_TE.numel():
            lowest, highest = torch.aminmax(logits_TE.detach())
            flag |= ~(torch.isfinite(lowest) & torch.isfinite(highest))

    def _capacity(self, logits_TE: Tensor) -> int:
        """Slots of each expert where tokens are dropped."""
        tokens, experts = logits_TE.shape
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        # Tensor-parallel ranks share the slots out among them.
        multiple = bwc_tensor_model_parallel_world_size(groups.mpu)
        return expert_capacity(tokens, experts, self.k, factor, self.min_capacity, multiple)

    def _fill(self, plan: RoutePlan, logits_TE: Tensor) -> tuple[int | Tensor, Slots]:
        """Capacity of every expert's buffer, equal on all ranks of the group, and the slots."""
        if self.drop_tokens:
            capacity = self._capacity(logits_TE)
            return capacity, fill_slots(plan, capacity)
        tensor_parallel = bwc_tensor_model_parallel_world_size(groups.mpu)
        largest = maximum_over(self.ep_group, plan.demand_E.max().clamp_min(1))
        padded = (largest + tensor_parallel - 1) // tensor_parallel * tensor_parallel
        return padded, fill_slots(plan, None)


def _recomputes() -> bool:
    """Whether backward is recomputing a checkpointed pass, which has been observed before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _sparse(
    l_aux: Tensor, capacity: int | Tensor, plan: RoutePlan, slots: Slots, weights_TK: Tensor
) -> tuple[Any, ...]:
    indices = torch.where(slots.kept_TK, plan.experts_TK, -1).t().to(torch.int32).contiguous()
    locations = slots.locations_TK.t().to(torch.int32).contiguous()
    gates = weights_TK.t().contiguous()
    experts = plan.demand_E.shape[0]
    if HOST_HAS_SPARSE_ROUTES:
        return l_aux, capacity, experts, indices, locations, gates, plan.demand_E
    return l_aux, capacity, experts, list(indices), list(locations), list(gates), plan.demand_E


def _dense(l_aux: Tensor, capacity: int | Tensor, plan: RoutePlan, slots: Slots, weights_TK: Tensor) -> tuple[Any, ...]:
    tokens, experts, capacity = plan.experts_TK.shape[0], plan.demand_E.shape[0], int(capacity)
    column_TK = plan.experts_TK * capacity + slots.locations_TK
    # One spare column takes the routes without a slot.
    column_TK = torch.where(slots.kept_TK, column_TK, experts * capacity)
    combine = weights_TK.new_zeros(tokens, experts * capacity + 1).scatter(1, column_TK, weights_TK)
    dispatch = torch.zeros_like(combine, dtype=torch.bool).scatter_(1, column_TK, slots.kept_TK)
    shape = (tokens, experts, capacity)
    return l_aux, combine[:, :-1].reshape(shape), dispatch[:, :-1].reshape(shape), plan.demand_E
