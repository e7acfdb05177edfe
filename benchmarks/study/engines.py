"""Real DeepSpeed engines of one rank, several after each other in one process."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger
from torch import nn

from ssr_deepspeed.hosts.engine import initialize


def start_process_group() -> None:
    """This process alone as a gloo group, once."""
    logger.setLevel("ERROR")
    torch.set_num_threads(1)
    if not dist.is_initialized():
        # DeepSpeed compiles an operator with the ninja on the PATH; pip puts one beside the interpreter.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False)


def build_engine(
    model: nn.Module,
    block: dict[str, Any],
    optimizer: dict[str, Any],
    steps: int,
    schedule: dict[str, Any],
    **batch: int,
) -> DeepSpeedEngine:
    """An engine in fp32 whose router obeys `block`: AdamW without decay of the gains, clipped, warm-up and cosine.

    Args:
        optimizer: AdamW's parameters.
        schedule: `warmup_num_steps` and `cos_min_ratio`.
        batch: DeepSpeed's batch keys.
    """
    weights = list(model.parameters())
    decay = optimizer["weight_decay"]
    groups = split_params_into_different_moe_groups_for_optimizer(
        [
            {"name": "matrices", "params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": decay},
            {"name": "gains", "params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
        ]
    )
    config = {
        **batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {**optimizer, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": steps, "warmup_type": "linear", **schedule},
        },
        "zero_optimization": {"stage": 0},
        # What the monitor does would count as training time.
        "ssr": {**block, "monitor": {"interval": 0}},
    }
    return initialize(model=model, model_parameters=[group for group in groups if group["params"]], config=config)[0]


def close_engine(engine: DeepSpeedEngine) -> None:
    """Give an engine's memory back."""
    engine.ssr.release()
    engine.destroy()
    gc.collect()
