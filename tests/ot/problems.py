"""Scores that routers really produce, and the ones that break solvers."""

import torch

KINDS = ["random", "collapsed", "clustered", "one-hot", "constant", "one expert", "fewer tokens than experts"]


def problem(kind, tokens=96, experts=8):
    """`C [T, E]`, fp64, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    centres = 3 * torch.randn(4, experts, generator=generator, dtype=torch.float64)
    return {
        "random": noise,
        "collapsed": noise + 10.0 * torch.arange(experts) / experts,
        "clustered": centres[torch.arange(tokens) % 4] + 0.05 * noise,
        "one-hot": 20.0 * torch.eye(experts, dtype=torch.float64)[torch.arange(tokens) % 3],
        "constant": torch.zeros(tokens, experts, dtype=torch.float64),
        "one expert": noise[:, :1],
        "fewer tokens than experts": noise[:3],
    }[kind]
