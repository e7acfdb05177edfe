"""Host: routers that return weights and indices, found by trying them out.

AutoEP's router and those of most of transformers' MoE families differ in names and in what they make of their
logits, and agree in what they return. So no list of classes is kept: whatever looks like a router is run once, as a
copy with random weights on a few random tokens, and its answer is looked at.

Tested with AutoEP of deepspeed 0.19.8 and with transformers 5.22.2.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from ssr_deepspeed.token_router import HostContract, HostLogits, given_routes

_TOKENS = 5
_LOOKS_LIKE_ONE = re.compile(r"router|gate$|gating|topk", re.IGNORECASE)


def find_token_routers(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, HostContract]], dict[str, str]]:
    """Routers that SSR can serve, by name, with their contracts; and those beside experts that it cannot, with reasons.

    The model's own modules are not run and not changed.
    """
    served: dict[str, tuple[nn.Module, HostContract]] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, TopKGate) or not _LOOKS_LIKE_ONE.search(type(module).__name__):
            continue
        contract = inspect_host(module)
        if isinstance(contract, HostContract):
            served[name] = (module, contract)
        elif _has_experts_beside(model, name):
            refused[name] = f"{type(module).__name__}: {contract}"
    return served, refused


def inspect_host(module: nn.Module) -> HostContract | str:
    """What a router is, found by running a copy of it; or why SSR cannot serve it, as a sentence."""
    shape, linear = _logits_weight(module)
    if shape is None:
        return "it has no weight of its own, and no child, that could make logits of tokens"
    copy = _copy_with_random_weights(module, torch.Generator("cpu").manual_seed(0)).eval()
    tokens_TM = torch.linspace(-9, 9, _TOKENS * shape[1], device="cpu").sin().view(_TOKENS, shape[1])
    reason = ""
    for tokens in (tokens_TM, tokens_TM.unsqueeze(0)):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return _contract_of(copy, (tokens, *_biases(module, shape[0])), *shape, linear)
        except _UnservableError as error:
            return str(error)
        except Exception as error:
            reason = f"its forward does not take hidden states alone ({type(error).__name__}: {error})"
    return reason


class _UnservableError(Exception):
    """Why, as a sentence."""


def _biases(module: nn.Module, experts: int) -> list[Tensor]:
    """What a router's forward takes beside hidden states, required or named so: a bias of each expert."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return [torch.zeros(experts, device="cpu") for one in parameters if one.default is one.empty or "bias" in one.name]


def _contract_of(
    router: nn.Module, inputs: tuple[Tensor, ...], experts: int, width: int, linear: str | None
) -> HostContract:
    calls: list[int] = []
    if linear is not None:
        router.get_submodule(linear).register_forward_hook(lambda *_: calls.append(1))
    with HostLogits(experts, width) as logits:
        output = router(*inputs)
    if len(logits.found) != 1:
        raise _UnservableError(f"it computes logits {len(logits.found)} times a pass, and SSR follows one")
    indices_at, k = _where_indices_are(output, experts)
    weights_at = indices_at - 1
    logits_TE = logits.matrix().float()
    logits_at = next((at for at, value in enumerate(output[:weights_at]) if _is_same(value, logits_TE)), None)
    contract = HostContract(experts, width, k, weights_at, indices_at, logits_at, linear if calls else None)
    favourite_T = torch.arange(_TOKENS, device="cpu") % experts
    shifted_TE = logits_TE + 50.0 * torch.nn.functional.one_hot(favourite_T, experts)
    found_TK = _again(router, inputs, contract, shifted_TE, None)[indices_at]
    if not bool((found_TK == favourite_T.unsqueeze(1)).any(1).all()):
        raise _UnservableError("it does not choose the experts with the largest logits")
    wanted_TK = (favourite_T.unsqueeze(1) + torch.arange(k, device="cpu")) % experts
    found_TK = _again(router, inputs, contract, logits_TE, wanted_TK)[indices_at]
    if not torch.equal(found_TK, wanted_TK):
        raise _UnservableError("it does not take what one top-k over all experts gives it")
    return contract


def _again(
    router: nn.Module, inputs: tuple[Tensor, ...], contract: HostContract, logits_TE: Tensor, indices_TK: Tensor | None
) -> tuple[Any, ...]:
    with given_routes(router, contract, logits_TE, indices_TK):
        return router(*inputs)


def _is_same(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() == like.numel() and torch.equal(value.view_as(like), like)


def _where_indices_are(output: Any, experts: int) -> tuple[int, int]:
    """Position of the indices `[T, K]` in what a router returns, the weights before them, and K."""
    if not isinstance(output, tuple | list):
        raise _UnservableError(
            f"it returns a {type(output).__name__}, and not logits or counts with weights and indices"
        )
    for at, value in enumerate(output):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() != 2 or value.dtype == torch.bool:
            continue
        before = output[at - 1] if at else None
        if len(value) == _TOKENS and isinstance(before, Tensor) and before.shape == value.shape:
            if not before.is_floating_point() or value.min() < 0 or value.max() >= experts:
                continue
            return at, value.shape[1]
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in output]
    raise _UnservableError(
        f"of {_TOKENS} tokens it returns {shapes}, and not weights [T, K] followed by indices [T, K]"
    )


def _logits_weight(module: nn.Module) -> tuple[tuple[int, int] | None, str | None]:
    """Shape `[E, M]` of what makes the logits, and the child that holds it."""
    for name, parameter in module.named_parameters(recurse=False):
        shape = _shape(parameter)
        if len(shape) == 2 and name == "weight":
            return (shape[0], shape[1]), None
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            shape = _shape(child.weight)
            return (shape[0], shape[1]), name
    return None, None


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the whole parameter, also where ZeRO-3 has split it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _copy_with_random_weights(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same module on the CPU in fp32 without its hooks, its weights random, its buffers zero."""
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    own = {*nn.Module().__dict__, "forward"}  # one on the instance would run the module itself
    copy.__dict__.update({key: value for key, value in module.__dict__.items() if key not in own})
    for name, parameter in module._parameters.items():
        # Logits of about one: larger ones would hide what is added to them.
        shape = () if parameter is None else _shape(parameter)
        random = torch.randn(shape, generator=generator, device="cpu") / max(shape[-1:], default=1) ** 0.5
        copy.register_parameter(name, None if parameter is None else nn.Parameter(random))
    for name, buffer in module._buffers.items():
        copy.register_buffer(
            name, None if buffer is None else torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
        )
    for name, child in module.named_children():
        copy.add_module(name, _copy_with_random_weights(child, generator))
    return copy


def _has_experts_beside(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return any("expert" in sibling for sibling, _ in parent.named_children())
