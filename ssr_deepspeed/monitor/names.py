"""What the metrics are called and mean. Readers of records need no more, and wait for no import of torch.

`METRICS` is also the README's table.
"""

from __future__ import annotations

DEAD_BELOW = 0.01
"""An expert is dead if its load over a window is below this share of the mean."""

METRICS = {
    "max_vio": "`max l / m - 1` of each step's global batch, mean over the window's steps",
    "max_vio_window": "`max l / m - 1` of the loads summed over the window",
    "min_vio": "`min l / m - 1` of the window",
    "mean_vio": "mean of `abs(l / m - 1)` of the window",
    "cv": "standard deviation of the window's loads over `m`",
    "effective_experts": "`exp(entropy of l / sum l) / E` of the window",
    "dead_share": "share of experts with less than 1 % of `m` in the window",
    "drop_rate": "share of the routes asked for that found no slot",
    "slot_fill": "share of the slots that were taken",
    "straggler": "routes received by the fullest rank over the mean rank's: mean over the last step's micro-batches",
    "transport_share": "share of passes that solved a transport problem",
    "sweeps": "iterations of a transport pass, mean",
    "column_error": "relative column error of a transport pass, mean",
    "unconverged": "share of the transport passes that ended above their tolerance",
    "router_entropy": "entropy of the router's softmax over `log E`, mean over tokens (sampled)",
    "top_k_mass": "softmax probability of the top k experts, geometric mean over tokens (sampled)",
    "nonfinite": "share of tokens whose logits hold a NaN or an infinity (sampled)",
    "rerouted": "share of routes that the softmax's own top-k would not have taken (sampled)",
    "max_vio_softmax": "MaxVio of the same tokens if the softmax's top-k had routed them (sampled)",
    "max_vio_routed": "MaxVio of these tokens as they were routed (sampled)",
    "potential": "largest potential over the entropy (sampled)",
}
"""Of a layer, in the order of the records. Sampled: of one pass of each rank and window."""

LESS_IS_WORSE = {"min_vio", "effective_experts", "slot_fill", "router_entropy"}
"""Metrics whose worst layer is the one that has least."""
