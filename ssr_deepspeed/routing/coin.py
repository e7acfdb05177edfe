"""The coin that makes a step a transport step.

A pure function of integers: the same on every rank, for every micro-batch, in every recomputation
and after every restart. Python's `hash` and every random state are left alone.
"""

from __future__ import annotations

from ssr_deepspeed.config import SSRConfig

_MASK = (1 << 64) - 1


def is_transport_step(config: SSRConfig, step: int, layer: int) -> bool:
    """Whether `layer` routes by transport at optimizer step `step`.

    Args:
        config: gives p at that step, the seed, and whether each layer has a coin of its own.
        step: optimizer steps taken before this one.
        layer: index among all routers of the whole model, over all pipeline stages.
    """
    word = _mix(_mix(config.seed) ^ step)
    if config.per == "layer":
        word = _mix(word ^ (layer + 1))
    return (word >> 11) * 2.0**-53 < config.probability_at(step)


def _mix(word: int) -> int:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): increment and finaliser."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
