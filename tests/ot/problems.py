"""Scores that routers really produce, and the ones that break solvers."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class Operations(TorchDispatchMode):
    """Counts torch's operations while it is entered."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reads(self):
        """How often the host has read a value: on an accelerator it waits for that."""
        return self.counts["_local_scalar_dense"]
