"""Load metrics of every layer and of the model, from a window's counts. `l` is an expert's load, `m` their mean.

`monitor.names` names them all, with their meaning.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssr_deepspeed.monitor.counts import LoadWindow
from ssr_deepspeed.monitor.names import DEAD_BELOW, LESS_IS_WORSE, METRICS
from ssr_deepspeed.monitor.sample import SAMPLED


def layer_metrics(window: LoadWindow) -> dict[str, dict[str, Any]]:
    """JSON-ready metrics of every layer of a window, and `load`, each expert's share; None is what is not defined."""
    load_LE = window.demand_WLE.sum(0)
    figures = _of_loads(window, load_LE) | _of_routes(window) | _of_samples(window)
    table_LM = _rounded(torch.stack([figures[metric] for metric in METRICS], 1))
    shares_LE = _rounded(load_LE / load_LE.sum(1, keepdim=True))
    return {
        name: dict(zip(METRICS, figures_M, strict=True)) | {"load": share_E[:experts]}
        for name, experts, figures_M, share_E in zip(window.layers, window.experts, table_LM, shares_LE, strict=True)
    }


def model_metrics(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over all layers: the mean of each metric, and that of its worst layer with the layer's name."""
    figures: dict[str, Any] = {}
    for metric in METRICS:
        known = {name: layer[metric] for name, layer in layers.items() if layer[metric] is not None}
        if known:
            worst = (min if metric in LESS_IS_WORSE else max)(known.values())
            name = next(name for name, value in known.items() if value == worst)
            figures[metric] = {"mean": finite(sum(known.values()) / len(known)), "worst": worst, "layer": name}
    return figures


def _of_loads(window: LoadWindow, load_LE: Tensor) -> dict[str, Tensor]:
    experts_L = torch.tensor(window.experts, dtype=torch.float64, device="cpu")
    # Layers with fewer experts than the widest have columns that stand for none.
    real_LE = torch.arange(load_LE.shape[1], device="cpu") < experts_L.unsqueeze(1)
    mean_L = load_LE.sum(1) / experts_L
    ratio_LE = load_LE / mean_L.unsqueeze(1)

    def mean_over_experts(value_LE: Tensor) -> Tensor:
        return torch.where(real_LE, value_LE, 0.0).sum(1) / experts_L

    entropy_L = torch.special.entr(load_LE / load_LE.sum(1, keepdim=True)).sum(1)
    dead_LE = torch.where(ratio_LE.isnan(), ratio_LE, (ratio_LE < DEAD_BELOW).double())
    return {
        "max_vio": _max_vio(window.demand_WLE, experts_L).nanmean(0),
        "max_vio_window": _max_vio(load_LE, experts_L),
        "min_vio": torch.where(real_LE, ratio_LE, math.inf).amin(1) - 1,
        "mean_vio": mean_over_experts((ratio_LE - 1).abs()),
        "cv": mean_over_experts((ratio_LE - 1).square()).sqrt(),
        "effective_experts": entropy_L.exp() / experts_L,
        "dead_share": mean_over_experts(dead_LE),
    }


def _of_routes(window: LoadWindow) -> dict[str, Tensor]:
    dispatched_L = window.dispatched_WLE.sum((0, 2))
    return {
        "drop_rate": 1 - dispatched_L / window.demand_WLE.sum((0, 2)),
        "slot_fill": dispatched_L / torch.where(window.slots_L > 0, window.slots_L, math.nan),
        "straggler": _straggler(window),
        "transport_share": window.transport_share_L,
        "sweeps": window.sweeps_L,
        "column_error": window.column_error_L,
        "unconverged": window.unconverged_L,
    }


def _straggler(window: LoadWindow) -> Tensor:
    """The fullest rank's load over the mean: of each micro-batch, then their mean. NaN without expert parallelism."""
    mean_GL = window.received_GLR.sum(2) / window.present_LR.sum(1)
    return (window.received_GLR.amax(2) / mean_GL).nanmean(0)


def _of_samples(window: LoadWindow) -> dict[str, Tensor]:
    width = (window.sampled_LX.shape[1] - SAMPLED) // 2
    sums_LX, before_LE, after_LE = window.sampled_LX.split([SAMPLED, width, width], 1)
    tokens_L, spoilt_L, entropy_L, surprise_L, routes_L, elsewhere_L, potential_L, samples_L = sums_LX.unbind(1)
    experts_L = torch.tensor(window.experts, dtype=torch.float64, device="cpu")
    return {
        "router_entropy": entropy_L / tokens_L / experts_L.log(),
        "top_k_mass": (-surprise_L / tokens_L).exp(),
        "nonfinite": spoilt_L / (tokens_L + spoilt_L),
        "rerouted": elsewhere_L / routes_L,
        "max_vio_softmax": _max_vio(before_LE, experts_L),
        "max_vio_routed": _max_vio(after_LE, experts_L),
        "potential": potential_L / samples_L,
    }


def _max_vio(load_LE: Tensor, experts_L: Tensor) -> Tensor:
    return load_LE.amax(-1) / (load_LE.sum(-1) / experts_L) - 1


def _rounded(table: Tensor) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in table.round(decimals=6).tolist()]


def finite(value: Any) -> float | None:
    """A number as JSON knows it: None for NaN and infinities."""
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None
