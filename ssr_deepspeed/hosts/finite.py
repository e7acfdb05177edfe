"""Router logits that stop being finite stop the run, on every rank, and say where.

Gates flag a NaN or an infinity on the device. At every optimizer step the ranks take the maximum
of their flags, one number a layer. On the CPU it is read at once, before the step changes a
weight. On an accelerator reading would stall the step, so the copy to the host runs beside it and
is looked at one step later, or before a checkpoint is saved. Under fp16 nothing is checked: there the
loss scaler expects overflow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssr_deepspeed.collectives import maximum_over, to_host
from ssr_deepspeed.router import Router


class NonfiniteLogitsError(RuntimeError):
    """A router's logits were NaN or infinite, on every rank the same."""

    def __init__(self, layer: str, rank: int, step: int) -> None:
        self.layer, self.step = layer, step
        super().__init__(
            f"SSR: the router logits of {layer} were NaN or infinite on rank {rank} in the passes of "
            f"optimizer step {step}: look for a diverging loss (learning rate, data) and go on from the "
            "last checkpoint before it"
        )


class FiniteWatch:
    """Asks the gates of one engine, at every optimizer step, whether their logits were finite.

    Args:
        gates: this rank's gates by their index among the model's layers.
        layers: names of all routers of the model, over all pipeline stages.
        device: where the gates run.
    """

    def __init__(self, gates: dict[int, Router], layers: list[str], device: torch.device) -> None:
        self._layers = layers
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        # One buffer, in which every gate has its place: a step asks for all of them at once.
        self._flag_L = torch.zeros(len(layers), dtype=torch.bool, device=device)
        for layer, gate in gates.items():
            gate.ssr.nonfinite = self._flag_L[layer]
        self._reads_at_once = device.type == "cpu"
        self._pending: tuple[int, Tensor, Any] | None = None

    def forget(self) -> None:
        """Drop what the passes so far have left: the weights are others now."""
        self._pending = None
        self._flag_L.zero_()

    def settle(self) -> None:
        """Read what is still on its way, as `before_step` would at the next step."""
        before, self._pending = self._pending, None
        if before is not None:
            self._read(*before)

    def before_step(self, step: int) -> None:
        """Check the passes since the last call; every rank calls it, one collective.

        Args:
            step: optimizer steps taken before this one.

        Raises:
            NonfiniteLogitsError: on all ranks, if a logit was NaN or infinite on any of them: in this step's
                passes on the CPU, in those of the step before on an accelerator.
        """
        # The rank plus one, so that zero is "all finite".
        flag_L = self._flag_L.int() * (self._rank + 1)
        self._flag_L.zero_()
        flag_L = maximum_over(dist.group.WORLD if dist.is_initialized() else None, flag_L)
        if self._reads_at_once:
            self._read(step, flag_L, None)
            return
        self.settle()
        self._pending = (step, *to_host(flag_L))

    def _read(self, step: int, flag_L: Tensor, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        for name, flag in zip(self._layers, flag_L.tolist(), strict=True):
            if flag:
                raise NonfiniteLogitsError(name, flag - 1, step)
