"""Bits per byte and expert load on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils.data import DataLoader

from ssr_deepspeed.monitor.metrics import finite
from ssr_deepspeed.pretrain.data import Corpus
from ssr_deepspeed.pretrain.model import IGNORED
from ssr_deepspeed.routing import max_violation


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine, batches: DataLoader, corpus: Corpus, stops: Callable[[], bool]
) -> dict[str, Any] | None:
    """Evaluate on this rank's batches and sum over all ranks, which must have equally many.

    Args:
        stops: called after each batch; whether to stop there, the same on every rank.

    Returns:
        None when it was stopped, else
        `bits_per_byte`: cross-entropy of all targets over the bytes of text they stand for;
        `nats_per_token`; `tokens`; `max_vio`: each MoE layer's MaxVio over the whole set.
    """
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    loads = torch.zeros((), dtype=torch.float64, device=engine.device)
    for tokens_BL, labels_BL, used_BL in batches:
        output = engine(tokens_BL.to(engine.device), labels_BL.to(engine.device), used_BL.to(engine.device))
        targets = labels_BL[labels_BL != IGNORED]
        known = [float(corpus.bytes_per_token[targets].sum()), float(len(targets))]
        totals += torch.cat([output.nats.double().reshape(1), torch.tensor(known, device=engine.device)])
        loads = loads + output.counts_NE
        if stops():
            engine.train()
            return None
    engine.train()
    dist.all_reduce(totals)
    dist.all_reduce(loads)
    nats, text_bytes, count = totals.tolist()
    return {
        "bits_per_byte": finite(nats / math.log(2) / text_bytes),
        "nats_per_token": finite(nats / count),
        "tokens": int(count),
        "max_vio": [finite(value) for value in max_violation(loads)],
    }
