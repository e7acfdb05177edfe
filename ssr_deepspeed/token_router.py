"""SSR behind a router that returns weights and indices: AutoEP's `TokenChoiceTopKRouter`, and Hugging Face's.

Such a host makes of its logits whatever its model was trained with: a softmax or a sigmoid, groups of experts, a
correction bias, a norm, a scale. None of it is known here. Potentials reach it through its logits:

    own          host(Z)                     always: a pass without potentials is the host's to the bit
    potentials   host((C + g) / xi)          selection and weights of the plan, by the host's own function of logits
    selection    host(C + g) chooses, and host(Z), made to choose the same, weighs

The logits are met where the host computes them, in its one `torch.nn.functional.linear` with a weight `[E, M]`; and
what it chooses, in its one top-k over `[T, E]`. `hosts/inspection.py` tries
out beforehand whether a host can be served.

Shapes: T tokens, E experts, K choices a token, M model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssr_deepspeed.config import LOSS_RULES, SSRConfig
from ssr_deepspeed.router import Router
from ssr_deepspeed.routing import Batch, Choice, RoutePlan, asked_routes, routes_of_each


@dataclass(frozen=True)
class HostContract:
    """What was found out about a host's router by running it once."""

    experts: int
    width: int
    k: int
    weights_at: int
    """Where in the host's output the weights `[T, K]` are."""
    indices_at: int
    """Where the indices `[T, K]` are."""
    logits_at: int | None
    """Where in the host's output the logits `[T, E]` are, if it returns them."""
    linear: str | None
    """The child that makes the logits, or None where the router's own forward does."""

    def weight_of(self, router: nn.Module) -> Tensor:
        """The weight that makes a router's logits, `[E, M]`, or what this rank holds of it."""
        owner = router if self.linear is None else router.get_submodule(self.linear)
        return next(parameter for parameter in owner.parameters() if parameter.dim() > 0)

    def logits_of(self, router: nn.Module, input: Tensor, output: tuple[Any, ...]) -> Tensor | None:
        """A pass's logits `[T, E]`, fp32, as returned or of the weight; None where ZeRO-3 has split that."""
        if self.logits_at is not None:
            return output[self.logits_at].reshape(-1, self.experts).float()
        weight_EM = self.weight_of(router)
        if weight_EM.shape != (self.experts, self.width):
            return None
        return nn.functional.linear(input.reshape(-1, self.width).float(), weight_EM.float())


class Padding:
    """Which tokens of a model's batch are padding, for routers whose host does not tell them."""

    def __init__(self) -> None:
        self.used_T: Tensor | None = None
        """Of the model's last batch, false where a token is padding, as it came; None where nothing is known."""
        self._there: Tensor | None = None
        self._position: int | None = None

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the model: keep its `attention_mask` if it has one number a token."""
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            if self._position is None:
                names = list(inspect.signature(model.forward).parameters)
                self._position = names.index("attention_mask") if "attention_mask" in names else len(names)
            mask = args[self._position] if self._position < len(args) else None
        self.used_T = mask.ne(0).reshape(-1) if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._there = None

    def used(self, tokens: int, device: torch.device) -> Tensor | None:
        """False where a token is padding, of a pass over that many tokens; None where nothing is known.

        One tensor for all layers, on their device: a model moves a mask there itself.
        """
        if self.used_T is None or len(self.used_T) != tokens:
            return None
        if self._there is None or self._there.device != device:
            self._there = self.used_T.to(device, non_blocking=True)
        return self._there


class TokenRouter(Router):
    """A host's router with SSR's potentials in its logits. `served_class` makes the class that a module becomes."""

    contract: HostContract
    padding: Padding
    experts_group: Any
    """The process group of an expert-parallel host around the router; None without one."""

    @property
    def expert_parallel_group(self) -> Any:
        """The group that the host has given the layer around the router."""
        return self.experts_group

    @property
    def router_weight(self) -> Tensor:
        """The weight that makes the logits, `[E, M]`, or what this rank holds of it."""
        return self.contract.weight_of(self)

    @property
    def router_sizes(self) -> tuple[int, int, int]:
        """E, M and K."""
        return self.contract.experts, self.contract.width, self.contract.k

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        contract: HostContract,
        config: SSRConfig,
        layer: int,
        data_parallel_group: Any = None,
        padding: Padding | None = None,
        experts_group: Any = None,
    ) -> TokenRouter:
        """Turn a host's router into one of SSR's, in place."""
        module.__class__ = served_class(type(module))
        assert isinstance(module, TokenRouter)
        module.contract, module.padding, module.experts_group = contract, padding or Padding(), experts_group
        module._begin(config, layer, data_parallel_group)
        return module

    def release(self) -> nn.Module:
        """Turn the router back into the host's own, in place."""
        del self.contract, self.padding, self.experts_group
        return super().release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as the host's router: the class was made at run time, and the rule is the engine's."""
        ours = ("ssr", "contract", "padding", "experts_group")
        state = {key: value for key, value in self.__dict__.items() if key not in ours}
        return _unpickle, (_host_class(type(self)),), state

    # The logits are met by a function put in torch's place, which no trace follows: torch.compile breaks its graph.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's routes: its own, or those of the balancing rule's potentials."""
        child = None if self.contract.linear is None else self.get_submodule(self.contract.linear)
        with HostLogits(self.contract.experts, self.contract.width, child) as logits:
            own = super().forward(*args, **kwargs)
        logits_TE = logits.matrix().float()
        with torch.autocast(logits_TE.device.type, enabled=False):
            choice, batch = self._choose(
                logits_TE, self.padding.used(len(logits_TE), logits_TE.device), logits.tokens()
            )
            effective_TE, by_plan = _effective(choice, logits_TE, self.contract.k)
        output = own
        if effective_TE is not None:
            output = self._rerun(args, kwargs, effective_TE, by_plan, own, logits_TE)
        if self.training:
            self._observed(logits_TE, choice, batch, output)
        return output

    def _rerun(
        self, args: Any, kwargs: Any, effective_TE: Tensor, by_plan: bool, own: tuple[Any, ...], logits_TE: Tensor
    ) -> tuple[Any, ...]:
        at, values = self.contract.indices_at, self.contract.weights_at
        with (
            torch.set_grad_enabled(by_plan and torch.is_grad_enabled()),
            given_routes(self, self.contract, effective_TE),
        ):
            output = super().forward(*args, **kwargs)
        if not by_plan:
            with given_routes(self, self.contract, logits_TE, output[at]):
                output = super().forward(*args, **kwargs)
        # What the host says of its logits, it says of its own.
        merged = [
            mine if _is_per_expert(mine, effective_TE) else other for mine, other in zip(own, output, strict=True)
        ]
        merged[values] = output[values].to(own[values].dtype)
        return tuple(merged)

    def _observed(self, logits_TE: Tensor, choice: Choice, batch: Batch, output: tuple[Any, ...]) -> None:
        indices_TK = output[self.contract.indices_at].long()
        weights_TK = output[self.contract.weights_at]
        used_T = None if batch.mask is None else batch.mask.reshape(-1) != 0
        demand_E = routes_of_each(indices_TK, asked_routes(indices_TK, used_T), self.contract.experts)
        self.ssr.demand_E = demand_E
        plan = RoutePlan(indices_TK, weights_TK, weights_TK.detach().float().log(), used_T, demand_E)
        self._conclude(logits_TE, choice, plan, batch)


_served: dict[type[nn.Module], type[TokenRouter]] = {}


def served_class(host: type[nn.Module]) -> type[TokenRouter]:
    """The subclass of a host's router class that routes by SSR; recorders that ask `isinstance` still find it."""
    if host not in _served:
        name = f"SSR{host.__name__}"
        _served[host] = type(name, (TokenRouter, host), {"__module__": host.__module__, "__qualname__": name})
    return _served[host]


def refusal(config: SSRConfig) -> str | None:
    """Why a rule cannot route through such a host, as a sentence, or None when it can."""
    if config.rule in LOSS_RULES:
        return (
            f'rule "{config.rule}" works by a loss, and this host takes none from a router: use the model\'s own '
            "(output_router_logits, router_aux_loss_coef) with SSR disabled, or a rule without a loss"
        )
    if config.overflow == "next":
        return (
            'ssr.overflow = "next" moves what a full expert has no slot for, and this host drops nothing: leave it out'
        )
    return None


def _host_class(served: type[nn.Module]) -> type[nn.Module]:
    return next(base for base in served.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Router))


def _unpickle(host: type[nn.Module]) -> nn.Module:
    return host.__new__(host)


def _effective(choice: Choice, logits_TE: Tensor, k: int) -> tuple[Tensor | None, bool]:
    """The logits that route as chosen, None for the host's own; and whether they weigh too."""
    by_plan = choice.by_plan and k > 1
    if choice.potentials_E is None:  # plain routing, but for noise
        return (None if choice.logits_TE is logits_TE else choice.logits_TE), True
    scores_TE = choice.logits_TE if choice.scores_TE is None else choice.scores_TE
    scaled_TE = (scores_TE + choice.potentials_E) / choice.entropy
    if choice.shifts_T is not None:
        scaled_TE = torch.nn.functional.logsigmoid(scaled_TE - choice.shifts_T.unsqueeze(1) / choice.entropy)
    return (scaled_TE.detach() if choice.detach else scaled_TE), by_plan


def _is_per_expert(value: Any, like_TE: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like_TE.shape and value.is_floating_point()


class HostLogits:
    """While it is entered, remembers the logits that a host's forward computes, and of what.

    Those of a child are taken as its hooks leave them: under ZeRO-3 one of them brings the weight back for backward.
    """

    def __init__(self, experts: int, width: int, child: nn.Module | None = None) -> None:
        self.experts, self.width, self._child = experts, width, child
        self.found: list[tuple[Tensor, Tensor]] = []
        self._linear: Any = None

    def __enter__(self) -> HostLogits:
        # By its name, for ZeRO-3 has put another function there.
        self._linear = nn.functional.linear
        nn.functional.linear = self._watched
        self._hook = None if self._child is None else self._child.register_forward_hook(self._hooked)
        return self

    def __exit__(self, *error: Any) -> None:
        nn.functional.linear = self._linear
        if self._hook is not None:
            self._hook.remove()

    def _hooked(self, child: nn.Module, inputs: Any, output: Tensor) -> None:
        self.found[-1] = (self.found[-1][0], output)

    def _watched(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = self._linear(input, weight, bias)
        if tuple(weight.shape) == (self.experts, self.width):
            self.found.append((input, result))
        return result

    def matrix(self) -> Tensor:
        """The logits, `[T, E]`."""
        return self.found[0][1].reshape(-1, self.experts)

    def tokens(self) -> Tensor:
        """What they were made of, `[T, M]`."""
        return self.found[0][0].reshape(-1, self.width)


@contextmanager
def given_routes(
    router: nn.Module, contract: HostContract, logits_TE: Tensor, indices_TK: Tensor | None = None
) -> Iterator[None]:
    """While it lasts, a host's forward finds these logits in place of its own, and chooses these experts if given."""
    linear, child = nn.functional.linear, contract.linear

    def given(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if tuple(weight.shape) != (contract.experts, contract.width):
            return linear(input, weight, bias)
        return logits_TE.view(*input.shape[:-1], contract.experts)

    nn.functional.linear = given
    if child is not None:
        # Not called again, for its hooks: an instance's attribute comes before its modules.
        router.__dict__[child] = _StandIn(router.get_submodule(child), logits_TE)
    try:
        with _Chosen(contract, indices_TK):
            yield
    finally:
        nn.functional.linear = linear
        if child is not None:
            del router.__dict__[child]


class _Chosen(TorchFunctionMode):
    """Gives a host's one top-k over all experts these indices, if there are any."""

    def __init__(self, contract: HostContract, indices_TK: Tensor | None) -> None:
        super().__init__()
        self.contract, self.indices_TK = contract, indices_TK

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.indices_TK is not None and func in (torch.topk, Tensor.topk):
            k = kwargs.get("k", args[1] if len(args) > 1 else None)
            scores = args[0] if args else kwargs["input"]
            tokens = scores.numel() // self.contract.experts
            if (k, scores.shape[-1], tokens) == (self.contract.k, self.contract.experts, len(self.indices_TK)):
                indices = self.indices_TK.long().view(*scores.shape[:-1], k)
                return torch.return_types.topk((scores.gather(-1, indices), indices))
        return func(*args, **kwargs)


class _StandIn:
    """In a child's place: gives the logits, and is the child in all else."""

    def __init__(self, child: nn.Module, logits_TE: Tensor) -> None:
        self._child, self._logits_TE = child, logits_TE

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._logits_TE.view(*tokens.shape[:-1], -1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)
