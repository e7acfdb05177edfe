"""`SSRGate`: Selective Sinkhorn Routing behind the contract of DeepSpeed's `TopKGate`.

It is a `TopKGate` (the engine finds gates with `isinstance`, checkpoints match `moe.gate.wg.weight`)
with the same parameter and no other state: `TopKGate` checkpoints load into it strictly, and back.

    logits [T,E] -> potentials [E] (the balancing rule) -> routes [T,K] -> slots [T,K] -> host's tuple

What differs from `TopKGate`, for every k: the auxiliary loss is zero (except under a rule that works by
a loss), evaluation is deterministic, padding (`used_token`) is never routed, and an expert that
overflows keeps its most probable routes. `TopKGate`'s own random choices (`noisy_gate_policy`,
`use_rts`, `top2_2nd_expert_sampling`) play no part; noise is the configuration's.

Tested with the versions of DeepSpeed in `ssr_deepspeed/versions.py`, up to 0.19.3 with the dense contract. Not run
here: Tutel.

Shapes: T tokens, E experts, K choices a token, C capacity, M model width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from deepspeed.moe.sharded_moe import TOPK_GATE_TIMER, TopKGate
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import Tensor, nn

from ssr_deepspeed.collectives import maximum_over, numbers_of
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.router import Router, has_own_forward, recomputes
from ssr_deepspeed.routing import (
    RoutePlan,
    Slots,
    expert_capacity,
    fill_slots,
    route,
    routes_of_each,
    surviving_weights,
)

# Since 0.19.4 the third positional argument asks for sparse routes; before, it was `use_tutel`.
HOST_HAS_SPARSE_ROUTES = "sparse_routes" in inspect.signature(TopKGate.forward).parameters


class SSRGate(Router, TopKGate):
    """A `TopKGate` that routes by transport on chosen steps.

    Args:
        *args, **kwargs: `TopKGate`'s own.
        config: the settings; default `SSRConfig()`.
        layer: index among all routers of the model, for coins by layer.
        data_parallel_group: process group for `scope = "data_parallel"`; an engine gives its own.
    """

    # `TopKGate`'s own.
    wg: nn.Linear
    k: int
    ep_group: Any
    capacity_factor: float
    eval_capacity_factor: float
    min_capacity: int
    drop_tokens: bool
    wall_clock_breakdown: bool
    timers: Any
    gate_time: float

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

    @property
    def router_weight(self) -> Tensor:
        """The weight that makes the logits, `[E, M]`."""
        return self.wg.weight

    @property
    def router_sizes(self) -> tuple[int, int, int]:
        """E, M and K."""
        return (*self.wg.weight.shape, self.k)

    @property
    def expert_parallel_group(self) -> Any:
        """The group that the host has given the gate."""
        return self.ep_group

    @staticmethod
    def refusal(gate: TopKGate) -> str | None:
        """Why a gate cannot be replaced, as a sentence, or None when it can."""
        if type(gate) not in (TopKGate, SSRGate):
            return f"{type(gate).__qualname__} is a gate of its own kind: SSR replaces only TopKGate itself"
        experts = gate.wg.weight.shape[0]
        if has_own_forward(gate):
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
            ValueError: `used_token` has another number of entries than there are tokens; or, on every rank of an
                expert-parallel group, their capacities differ, as unequal numbers of tokens make them.
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
        config = self.ssr.config
        choice, batch = self._choose(logits_TE, mask, input_TM)
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
        loss = self._conclude(logits_TE, choice, plan, batch)
        # Carries a graph also where it is zero: pipeline engines start their backward pass from it.
        return plan, logits_TE[:0].sum() if loss is None else loss

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
            self._check_peers(capacity, len(logits_TE))
            return capacity, fill_slots(plan, capacity)
        tensor_parallel = bwc_tensor_model_parallel_world_size(groups.mpu)
        largest = maximum_over(self.ep_group, plan.demand_E.max().clamp_min(1))
        padded = (largest + tensor_parallel - 1) // tensor_parallel * tensor_parallel
        return padded, fill_slots(plan, None)

    def _check_peers(self, capacity: int, tokens: int) -> None:
        """Stop on all ranks before they exchange buffers of unequal size, which would hang, crash or mix up tokens.

        The first gate asks in every pass: a rank cannot know that only the others have changed. The numbers go from
        host to host, so that no device is waited for; a recomputed pass has asked before.
        """
        if self.ssr.peers is None or torch.compiler.is_compiling() or recomputes():
            return
        sizes = numbers_of(self.ssr.peers, (capacity, tokens))
        if any(theirs[0] != capacity for theirs in sizes.values()):
            most, least = max(sizes, key=lambda rank: sizes[rank]), min(sizes, key=lambda rank: sizes[rank])
            found = " and ".join(f"{sizes[r][1]} on rank {r} (capacity {sizes[r][0]})" for r in (most, least))
            raise ValueError(
                f"router {self.ssr.layer} got unequal numbers of tokens: {found}, and the experts of these ranks can "
                "only exchange buffers of one size: give all ranks of an expert-parallel group batches of one size, "
                "or build MoE with drop_tokens=False"
            )


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
