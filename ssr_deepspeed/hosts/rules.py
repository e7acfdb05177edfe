"""The state of balancing rules at the pace of an engine: committed once per optimizer step, saved with its checkpoints.

At every step the sums that all gates have observed travel in one all-reduce over the ranks that hold the same
gates, and every rank makes the same next state of them. Tensor-parallel peers take those of their first: each
sums over other ranks, and a last bit that differs would route one token two ways. A step that the loss scaler
skipped changes nothing. The state is saved in the checkpoint's client state, beside the module's: strict
loading keeps working with and without it. Every rank saves the state of the whole model, also of other
pipeline stages' layers.

Where a trigger decides about transport, what it says is read at once on the CPU and one step later on an
accelerator, so that no step waits for it. One uneven layer of any stage makes a step of all layers a transport
step on all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssr_deepspeed.collectives import from_first, gather_objects, maximum_over, sum_over, to_host
from ssr_deepspeed.config import LOSS_RULES, SSRConfig, Trigger
from ssr_deepspeed.router import Router, RouterState

KEY = "ssr_deepspeed_rules"
"""Of the client state."""


class RuleStates:
    """The rules of one engine's gates.

    Args:
        config: the settings.
        gates: this rank's gates by name.
        layers: names of all gates of the model, over all pipeline stages.
        group: the ranks that hold the same gates and see other tokens.
        copies: the ranks that hold the same gates and see the same tokens, or None.
        device: where the gates run.

    Raises:
        ValueError: the rule needs sums over ranks, and there is no group to sum over.
    """

    def __init__(
        self,
        config: SSRConfig,
        gates: dict[str, Router],
        layers: list[str],
        group: Any,
        copies: Any,
        device: torch.device,
    ) -> None:
        self._config, self._gates = config, gates
        self._total, self._agreed = sum_over(group), from_first(copies)
        measures = config.rule in ("ssr", "capacity")  # under other rules a trigger plays no part
        self._trigger = config.probability if measures and isinstance(config.probability, Trigger) else None
        self._observing = [gate for gate in gates.values() if gate.ssr.rule.sums is not None]
        # Asked of all ranks: one stage may hold all the gates there are, and others none.
        self._has_stages = any(gather_objects(len(gates) < len(layers)))
        self._decides_together = self._trigger is not None and config.per == "step" and self._has_stages
        self._measures = self._trigger is not None and (bool(self._observing) or self._decides_together)
        if self._observing and group is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f'ssr.rule = "{config.rule}" sums over the ranks that hold the same gates, but the engine has no '
                'data-parallel group; allowed here: rules without state, such as "ssr" with a number for probability'
            )
        self._checks_losses = config.rule in LOSS_RULES
        self._device = device
        self._pending: tuple[Tensor, Any] | None = None

    def after_step(self, applied: bool, loss_scale: float) -> None:
        """Commit what the passes of this optimizer step have observed; one collective for all gates.

        Args:
            applied: whether the step changed the weights; if not, its observations are dropped.
            loss_scale: what the step's gradients were multiplied by.

        Raises:
            RuntimeError: on all ranks, after the first step, if the rule works by a loss which the training
                loss does not contain.
        """
        if self._checks_losses:
            self._check_losses()
        if self._observing:
            self._commit(applied, loss_scale)
        if self._measures:
            self._measure()

    def _commit(self, applied: bool, loss_scale: float) -> None:
        """Make the next state of what the passes of the ranks' gates have observed, and forget that."""
        rules = [gate.ssr.rule for gate in self._observing]
        for rule in rules:
            rule.gather(loss_scale)
        sums = [rule.sums for rule in rules if rule.sums is not None]
        if applied:
            total = torch.cat(sums)
            total = self._agreed(total if self._total is None else self._total(total))
            for gate, part in zip(self._observing, total.split([len(part) for part in sums]), strict=True):
                gate.ssr.rule.commit(part, gate.ssr.transport)
        for part in sums:
            part.zero_()

    def _check_losses(self) -> None:
        """A loss that nobody adds, or weighs with zero, would leave the router unbalanced without a word."""
        asked = [gate.ssr.loss_reached for gate in self._gates.values() if gate.ssr.loss_reached is not None]
        self._checks_losses = False
        missing = torch.tensor(float(bool(asked) and not any(bool(reached) for reached in asked)), device=self._device)
        if maximum_over(dist.group.WORLD if dist.is_initialized() else None, missing):
            raise RuntimeError(
                f'ssr.rule = "{self._config.rule}" works by a loss, but no gradient has come back through it: add the '
                "second item that deepspeed.moe.layer.MoE returns, times a weight such as 0.01, to the training loss"
            )

    def _measure(self) -> None:
        """Set which layers route by transport at the next step, by the imbalance that is known by now."""
        before, self._pending = self._pending, None
        if self._device.type == "cpu":
            self._decide(self._uneven())
            return
        self._pending = to_host(self._uneven())
        if before is not None:
            before[1].synchronize()
            self._decide(before[0])

    def _uneven(self) -> Tensor:
        """Whether the trigger asks for transport, bool `[L]` for the layers here, or `[1]` for those of all stages."""
        assert self._trigger is not None
        flags = [gate.ssr.rule.state["imbalance"] > self._trigger.imbalance for gate in self._observing]
        uneven_L = torch.stack(flags) if flags else torch.zeros(0, dtype=torch.bool, device=self._device)
        if self._config.per == "layer":
            return uneven_L
        uneven = uneven_L.any().int().reshape(1)
        return (maximum_over(dist.group.WORLD, uneven) if self._decides_together else uneven).bool()

    def _decide(self, uneven_L: Tensor) -> None:
        for gate, uneven in zip(self._observing, uneven_L.expand(len(self._observing)).tolist(), strict=True):
            gate.ssr.transport = uneven

    def save(self) -> dict[str, Any]:
        """State of the whole model's rules, the same on every rank; a collective where the model has stages."""
        layers = {
            name: {
                "state": {key: value.detach().cpu() for key, value in gate.ssr.rule.state.items()},
                "transport": gate.ssr.transport,
            }
            for name, gate in self._gates.items()
            if gate.ssr.rule.state
        }
        if self._has_stages:
            layers = {name: saved for theirs in gather_objects(layers) for name, saved in theirs.items()}
        return {"kind": _kind(self._config), "layers": layers}

    def inherit(self, earlier: dict[nn.Module, RouterState]) -> None:
        """Go on with what the same gates have kept under another engine, where the rule is of the same kind."""
        for gate in self._gates.values():
            if gate in earlier and _kind(earlier[gate].config) == _kind(self._config):
                gate.ssr.rule.take(earlier[gate].rule.state)
                if self._trigger:
                    gate.ssr.transport = earlier[gate].transport

    def load(self, saved: dict[str, Any] | None) -> str | None:
        """Take over a checkpoint's state; a sentence where it has none that fits any rank, else None. One collective.

        Raises:
            ValueError: on all ranks, if a layer's state is missing or has another shape.
        """
        self._pending = None
        for gate in self._gates.values():
            if gate.ssr.rule.sums is not None:
                gate.ssr.rule.sums.zero_()
        # A disabled run saves an empty state, a rule that keeps nothing one without layers.
        kind, layers = (saved["kind"], saved["layers"]) if saved and saved["layers"] else ({}, {})
        fits = kind == _kind(self._config)
        problem = self._take(layers) if fits else None
        # A rank without routers, perhaps the first, misses nothing and hears of the others.
        begins = not fits and any(gate.ssr.rule.state for gate in self._gates.values())
        ranks = gather_objects((problem, begins))
        for theirs, _ in ranks:
            if theirs:
                raise ValueError(theirs)
        if fits and self._measures and self._device.type != "cpu":
            self._pending = to_host(self._uneven())  # as it was on its way when the checkpoint was saved
        if not any(begin for _, begin in ranks):
            return None
        for gate in self._gates.values():
            gate.renew_rule()
            if self._trigger:
                gate.ssr.transport = False
        found = f"the state of {_named(kind)}" if kind else "no balancing rule's state"
        return f"finds {found} in the checkpoint: {_named(_kind(self._config))} begins with its initial state"

    def _take(self, layers: dict[str, Any]) -> str | None:
        """Copy every gate's state; a sentence about the first that does not fit."""
        for name, gate in self._gates.items():
            theirs = layers[name]["state"] if name in layers else {}
            for key, value in gate.ssr.rule.state.items():
                if key not in theirs or theirs[key].shape != value.shape:
                    found = f"has shape {tuple(theirs[key].shape)}" if key in theirs else "is missing"
                    return (
                        f'cannot load the state "{key}" of rule "{self._config.rule}" at {name}: it {found} in the '
                        f"checkpoint, and has shape {tuple(value.shape)} here"
                    )
            gate.ssr.rule.take(theirs)
            if self._trigger:
                gate.ssr.transport = layers[name]["transport"]
        return None


def _kind(config: SSRConfig) -> dict[str, str]:
    """What a state must have in common with the rule that takes it over."""
    own = {"cost": config.cost, "polytope": config.carried.polytope} if config.rule == "carried" else {}
    return {"rule": config.rule, **own}


def _named(kind: dict[str, str]) -> str:
    rest = ", ".join(f'{key} "{value}"' for key, value in kind.items() if key != "rule")
    return f'rule "{kind["rule"]}"' + (f" ({rest})" if rest else "")
