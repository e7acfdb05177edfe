"""Router logits as training produces them: even, clustered, collapsed."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("random", "clustered", "collapsed")


def logits(kind: str, tokens: int, experts: int, seed: int = 0) -> Tensor:
    """`Z [T, E]`, fp32.

    Random: unit normal. Clustered: E / 4 (at least 4) topics of unequal size with centres of standard
    deviation 3, and noise .3 about them. Collapsed: unit normal plus a bias that falls by 6 from
    the first expert to the last, so that all tokens like the same experts.
    """
    generator = torch.Generator().manual_seed(seed)
    noise_TE = torch.randn(tokens, experts, generator=generator)
    if kind == "random":
        return noise_TE
    if kind == "collapsed":
        return noise_TE - torch.linspace(0, 6, experts)
    topics = max(4, experts // 4)
    centres = 3 * torch.randn(topics, experts, generator=generator)
    share = torch.rand(topics, generator=generator) + 0.1
    topic_T = torch.multinomial(share, tokens, replacement=True, generator=generator)
    return centres[topic_T] + 0.3 * noise_TE
