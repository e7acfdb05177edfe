"""Loss scalers of an engine under fp16: DeepSpeed's own, and torch's, of which DeepSpeed tells nobody."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from ssr_deepspeed.collectives import maximum_over


def torch_scaler(engine: DeepSpeedEngine) -> Any:
    """torch's own loss scaler, used for fp16 by autocast: the engine's, or under ZeRO its optimizer's."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return getattr(engine.optimizer, "torch_autocast_gradscaler", None) if scaler is None else scaler


def skipped_by_torch(engine: DeepSpeedEngine, scale: float) -> bool:
    """Whether torch's own scaler skipped the step that began with this scale, on any rank."""
    if torch_scaler(engine) is None:
        return False
    # It tells the engine nothing, but lets its scale fall; and each rank's judges its own experts' gradients alone.
    fell = torch.tensor(int(loss_scale(engine) < scale), device=engine.device)
    return bool(maximum_over(dist.group.WORLD, fell))


def loss_scale(engine: DeepSpeedEngine) -> float:
    """What the gradients of this step are multiplied by; 1 without a loss scaler."""
    if not scales_loss(engine):
        return 1.0
    scaler = torch_scaler(engine)
    if scaler is not None:
        return float(scaler.get_scale())
    optimizer: Any = engine.optimizer
    return float(optimizer.loss_scale if hasattr(optimizer, "loss_scale") else getattr(optimizer, "cur_scale", 1.0))


def scales_loss(engine: DeepSpeedEngine) -> bool:
    """Whether a loss scaler expects overflows and skips their step: fp16, plain or (since 0.17) by autocast."""
    if engine.fp16_enabled():
        return True
    autocast = getattr(engine, "torch_autocast_enabled", None)
    return autocast is not None and autocast() and engine.torch_autocast_dtype() == torch.float16
