"""What every router that SSR takes over has in common: its balancing rule, its step, and what it tells about a pass.

SSR's class of a router is a subclass of the host's, mixed with `Router`, and is assigned to the host's module in
place: the weight, its name, the hooks on the module and all references to it stay.

Shapes: T tokens, E experts, K choices a token, M model width.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.compiler import is_dynamo_compiling

from ssr_deepspeed.collectives import sum_over
from ssr_deepspeed.config import Scope, SSRConfig, Trigger
from ssr_deepspeed.ot import Solution
from ssr_deepspeed.routing import Batch, Choice, RoutePlan, Rule, is_transport_step, make_rule


@dataclass
class RouterState:
    """What a router needs beside its weight. Plain Python: never part of a state dict."""

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
    demand_E: Tensor | None = None
    """int64 `[E]`, routes that experts were asked to take in the last training pass, where the host does not say."""
    dispatched_E: Tensor | None = None
    """int64 `[E]`, routes of the last pass that got a slot, where routes are moved; else None."""
    data_parallel_group: Any = field(default=None, repr=False)
    peers: Any = field(default=None, repr=False)
    """The ranks that exchange buffers with this one, as a group that takes tensors on the CPU; None: nobody checks
    that their buffers are of one size."""

    def largest_potential(self) -> Tensor | None:
        """The largest potential over the entropy, as the last training pass used them, 0-dim; None without any."""
        potentials_E = self.rule.state.get("potentials") if self.solution is None else self.solution.potentials
        return None if potentials_E is None else potentials_E.abs().max() / self.config.xi

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
                f'rule "{self.config.rule}" balances over the {scope} group, but this router has none: '
                'give it one, let a DeepSpeed engine set it up, or use ssr.scope "rank"'
            )
        return group


class Router(nn.Module):
    """The part of a router that is SSR's. A host's subclass says where its weight is and how many experts it takes."""

    ssr: RouterState

    @property
    def router_weight(self) -> Tensor:
        """The weight that makes the logits, `[E, M]`, or what this rank holds of it."""
        raise NotImplementedError

    @property
    def router_sizes(self) -> tuple[int, int, int]:
        """E, M and K."""
        raise NotImplementedError

    @property
    def expert_parallel_group(self) -> Any:
        """The process group that shares the experts; None for this rank alone."""
        return None

    def _begin(self, config: SSRConfig, layer: int, data_parallel_group: Any) -> None:
        self.__dict__.pop("forward", None)  # the host class's own, or it would have been refused
        rule = make_rule(config, *self.router_sizes, self.router_weight.device)
        self.ssr = RouterState(config, rule, layer, data_parallel_group=data_parallel_group)
        self.set_step(0)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, for `to`, `cuda` and the like; what the rule keeps follows the weight, in fp32."""
        result = super()._apply(*args, **kwargs)
        old = self.ssr.rule
        if old.device != self.router_weight.device:
            self.renew_rule()
            if old.device.type != "meta":
                self.ssr.rule.take(old.state)
        return result

    def renew_rule(self) -> None:
        """Begin the balancing rule anew, with its initial state."""
        self.ssr.rule = make_rule(self.ssr.config, *self.router_sizes, self.router_weight.device)

    def release(self) -> nn.Module:
        """Turn the router back into the host's own, in place."""
        del self.ssr
        self.__class__ = next(base for base in type(self).__mro__ if not issubclass(base, Router))  # type: ignore[assignment]
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

    def _choose(self, logits_TE: Tensor, mask: Tensor | None, input_TM: Tensor | None) -> tuple[Choice, Batch]:
        """How this pass routes by the balancing rule, and what the rule was told about it.

        Args:
            logits_TE: fp32.
            mask: T entries; zero marks padding.
            input_TM: what the logits were made of, for rules that need it.
        """
        config, rule = self.ssr.config, self.ssr.rule
        batch = Batch(
            input_TM,
            mask,
            self.ssr.transport,
            recomputes(),
            lambda: sum_over(self.ssr.group(config.scope, self.expert_parallel_group)),
            lambda: sum_over(self.ssr.group("data_parallel", None)),
        )
        if not self.training:
            return rule.choose_frozen(logits_TE), batch
        if self.ssr.nonfinite is not None:
            self._watch(logits_TE, self.ssr.nonfinite)
        if config.noise_on(batch.transport):
            logits_TE = logits_TE + config.noise.scale * torch.randn_like(logits_TE)
        return rule.choose(logits_TE, batch), batch

    def _conclude(self, logits_TE: Tensor, choice: Choice, plan: RoutePlan, batch: Batch) -> Tensor | None:
        """Let the rule observe a training pass; its loss, if it works by one."""
        if not self.training:
            return None
        self.ssr.solution = choice.solution
        loss = self.ssr.rule.loss(choice.logits_TE, plan, batch)
        if not batch.recomputed:
            with torch.no_grad():
                self.ssr.rule.observe(logits_TE, choice, plan, batch)
        return loss if loss is None else self._asked_for(loss)

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


class LocalHook(functools.partial):
    """A hook of this process alone: where its module is pickled or copied, one that does nothing takes its place.

    That one is the standard library's, so that the module loads where this package is not.
    """

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward set on the instance does something else than its class's.

    accelerate leaves the class's own forward on the instance when it removes a hook.
    """
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def recomputes() -> bool:
    """Whether backward is recomputing a checkpointed pass, which has been observed before."""
    return not is_dynamo_compiling() and _current_graph_task_id() != -1
