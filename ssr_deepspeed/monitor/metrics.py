"""Load metrics of one layer, from its counts. `l` is an expert's load, `m` the mean over experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssr_deepspeed.monitor.counts import LoadWindow
from ssr_deepspeed.routing import max_violation

DEAD_BELOW = 0.01
"""An expert is dead if its load over a window is below this share of the mean."""


def layer_metrics(window: LoadWindow) -> dict[str, dict[str, Any]]:
    """JSON-ready metrics of every layer of a window; None stands for what is not defined.

    `max_vio` is the mean over the window's steps of each step's MaxVio over the global batch,
    `max_vio_window` that of the counts summed over the window; `load` the share of each expert.
    """
    return {
        name: _one_layer(
            window.demand_WLE[:, index, :experts],
            window.dispatched_WLE[:, index, :experts],
            float(window.transport_share_L[index]),
            float(window.column_error_L[index]),
        )
        for index, (name, experts) in enumerate(zip(window.layers, window.experts, strict=True))
    }


def _one_layer(demand_WE: Tensor, dispatched_WE: Tensor, transport: float, error: float) -> dict[str, Any]:
    load_E = demand_WE.sum(0)
    total, mean = load_E.sum(), load_E.mean()
    share_E = load_E / total
    figures = {
        "max_vio": max_violation(demand_WE).nanmean(),
        "max_vio_window": max_violation(load_E),
        "min_vio": load_E.min() / mean - 1,
        "cv": load_E.std(correction=0) / mean,
        "effective_experts": torch.special.entr(share_E).sum().exp() / len(load_E),
        "dead_share": (load_E < DEAD_BELOW * mean).double().mean(),
        "drop_rate": 1 - dispatched_WE.sum() / total,
        "transport_share": transport,
        "column_error": error,
    }
    return {name: finite(value) for name, value in figures.items()} | {"load": [finite(share) for share in share_E]}


def finite(value: Any) -> float | None:
    """A number as JSON knows it: None for NaN and infinities."""
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None
