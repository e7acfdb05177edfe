"""The state of balancing rules at the pace of an engine: committed once per optimizer step, saved with its checkpoints.

At every step the sums that all gates have observed travel in one all-reduce over the data-parallel
ranks, and every rank makes the same next state of them. A step that the loss scaler skipped changes nothing.
The state is saved in the checkpoint's client state, beside the module's: strict loading keeps working
with and without it. Every rank saves the state of the whole model, also of other pipeline stages' layers.

Where a trigger decides about transport, the measured imbalance is read at once on the CPU and one step
later on an accelerator, so that no step waits for it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ssr_deepspeed.collectives import gather_objects, sum_over, to_host
from ssr_deepspeed.config import SSRConfig, Trigger
from ssr_deepspeed.gate import SSRGate

KEY = "ssr"
"""Of the client state."""


class RuleStates:
    """The rules of one engine's gates.

    Args:
        config: the settings.
        gates: this rank's gates by name.
        data_parallel_group: the ranks that hold the same gates.
        device: where the gates run.
    """

    def __init__(
        self, config: SSRConfig, gates: dict[str, SSRGate], data_parallel_group: Any, device: torch.device
    ) -> None:
        self._config, self._gates = config, gates
        self._total = sum_over(data_parallel_group)
        measures = config.rule in ("ssr", "capacity")  # under other rules a trigger plays no part
        self._trigger = config.probability if measures and isinstance(config.probability, Trigger) else None
        self._observing = [gate for gate in gates.values() if gate.ssr.rule.sums is not None]
        self._reads_at_once = device.type == "cpu"
        self._pending: tuple[Tensor, Any] | None = None

    def after_step(self, applied: bool) -> None:
        """Commit what the passes of this optimizer step have observed; one collective for all gates.

        Args:
            applied: whether the step changed the weights; if not, its observations are dropped.

        Raises:
            RuntimeError: the rule works by a loss, which the training loss does not contain.
        """
        self._check_losses()
        if not self._observing:
            return
        rules = [gate.ssr.rule for gate in self._observing]
        for rule in rules:
            rule.gather()
        sums = [rule.sums for rule in rules if rule.sums is not None]
        if applied:
            total = torch.cat(sums)
            total = total if self._total is None else self._total(total)
            for gate, part in zip(self._observing, total.split([len(part) for part in sums]), strict=True):
                gate.ssr.rule.commit(part, gate.ssr.transport)
        for part in sums:
            part.zero_()
        if self._trigger:
            self._measure()

    def _check_losses(self) -> None:
        """A loss that nobody adds would leave the router unbalanced without a word."""
        if self._config.rule not in ("auxiliary", "global_auxiliary", "z"):
            return
        if self._gates and not any(gate.ssr.loss_reached for gate in self._gates.values()):
            raise RuntimeError(
                f'ssr.rule = "{self._config.rule}" works by a loss, but no gradient has come back through it: add the '
                "second item that deepspeed.moe.layer.MoE returns, times a weight such as 0.01, to the training loss"
            )

    def _measure(self) -> None:
        """Set which layers route by transport at the next step, by the imbalance that is known by now."""
        imbalance_L = torch.stack([gate.ssr.rule.state["imbalance"] for gate in self._observing])
        if self._reads_at_once:
            self._decide(imbalance_L)
            return
        before, self._pending = self._pending, to_host(imbalance_L)
        if before is not None:
            before[1].synchronize()
            self._decide(before[0])

    def _decide(self, imbalance_L: Tensor) -> None:
        assert self._trigger is not None
        uneven_L = (imbalance_L > self._trigger.imbalance).tolist()
        if self._config.per == "step":
            uneven_L = [any(uneven_L)] * len(uneven_L)
        for gate, uneven in zip(self._observing, uneven_L, strict=True):
            gate.ssr.transport = uneven

    def save(self) -> dict[str, Any]:
        """State of the whole model's rules, the same on every rank; one collective."""
        mine = {
            name: {key: value.detach().cpu() for key, value in gate.ssr.rule.state.items()}
            for name, gate in self._gates.items()
            if gate.ssr.rule.state
        }
        layers = {name: state for theirs in gather_objects(mine) for name, state in theirs.items()}
        transport = {name: gate.ssr.transport for name, gate in self._gates.items()}
        transport = {name: coin for theirs in gather_objects(transport) for name, coin in theirs.items()}
        return {"rule": self._config.rule, "layers": layers, "transport": transport}

    def load(self, saved: dict[str, Any] | None) -> str | None:
        """Take over a checkpoint's state; a sentence where it has none that fits, else None.

        Raises:
            ValueError: a layer's state has another shape.
        """
        self._pending = None
        for gate in self._gates.values():
            if gate.ssr.rule.sums is not None:
                gate.ssr.rule.sums.zero_()
        wanted = {name: gate.ssr.rule.state for name, gate in self._gates.items() if gate.ssr.rule.state}
        if not wanted:
            return None
        # A disabled run saves an empty state, a rule that keeps nothing one without layers.
        if not saved or not saved["layers"] or saved["rule"] != self._config.rule:
            was = f'the state of rule "{saved["rule"]}"' if saved and saved["layers"] else "no balancing rule's state"
            return f'the checkpoint has {was}: rule "{self._config.rule}" begins with its initial state'
        for name, state in wanted.items():
            theirs = saved["layers"].get(name, {})
            for key, value in state.items():
                if key not in theirs or theirs[key].shape != value.shape:
                    found = tuple(theirs[key].shape) if key in theirs else "none"
                    raise ValueError(
                        f'cannot load the state "{key}" of rule "{self._config.rule}" at {name}: shape '
                        f"{found} in the checkpoint, {tuple(value.shape)} here"
                    )
                value.copy_(theirs[key])
            if self._trigger:
                self._gates[name].ssr.transport = saved["transport"][name]
        return None


def say(sentence: str, rank: int) -> None:
    """One line from rank 0. DeepSpeed's logger hides all but warnings."""
    if rank == 0:
        print(f"SSR: {sentence}", file=sys.stderr, flush=True)
