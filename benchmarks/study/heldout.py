"""Held-out text: excerpts, swapped words, bits per byte.

Shapes: B sequences of L tokens, S sources, N MoE layers, E experts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.corpora import END
from ssr_deepspeed.pretrain.data import Sequences
from ssr_deepspeed.pretrain.model import IGNORED

BLOCK = 512
"""Bytes in one piece of an excerpt."""


@dataclass(frozen=True)
class Scored:
    """Tokens, and which of them are predicted for the score."""

    tokens: numpy.ndarray
    """uint16 `[tokens]`."""
    counts: numpy.ndarray
    """bool `[tokens]`: whether its cross-entropy is part of the score."""


def excerpt(tokens: numpy.ndarray, size: int) -> numpy.ndarray:
    """At most about `size` tokens: pieces of 512, or fewer if `size` is less, evenly spread over the text."""
    block = min(BLOCK, size)
    pieces = max(size // block, 1)
    if len(tokens) <= pieces * block:
        return tokens
    starts = [place * (len(tokens) - block) // max(pieces - 1, 1) for place in range(pieces)]
    return numpy.concatenate([tokens[start : start + block] for start in starts])


def plain(tokens: numpy.ndarray) -> Scored:
    """The text as it is, all of it scored."""
    return Scored(tokens, numpy.ones(len(tokens), dtype=bool))


def swap_words(tokens: numpy.ndarray, percent: float, seed: int) -> Scored:
    """Replace that share of the words by other words of the same text, drawn by their frequency.

    A word is a run of ASCII letters. What was put in is not scored: the score is over the bytes that
    are still the author's, predicted from a context that is partly not. So it has no part that
    every model loses alike on words that nobody could foresee.

    Args:
        tokens: byte tokens with `END` between documents.
        percent: of the words, 0 to 100, rounded to whole words.
        seed: chooses the words and what replaces them.

    Raises:
        ValueError: the text has fewer than two different words.
    """
    text = "".join(map(chr, tokens.tolist()))  # one character a token, END among them
    words = list(re.finditer(r"[A-Za-z]+", text))
    spellings = [word.group() for word in words]
    if len(set(spellings)) < 2:
        raise ValueError("the text has fewer than two different words: none can be swapped for another")
    random = numpy.random.default_rng(seed)
    chosen = set(random.permutation(len(words))[: round(len(words) * percent / 100)].tolist())
    pieces, scored, end = [], [], 0
    for index, word in enumerate(words):
        if index not in chosen:
            continue
        other = word.group()
        while other == word.group():
            other = spellings[random.integers(len(spellings))]
        kept = text[end : word.start()]
        pieces += [kept, other]
        scored += [True] * len(kept) + [False] * len(other)
        end = word.end()
    scored += [True] * (len(text) - end)
    swapped = "".join([*pieces, text[end:]])
    return Scored(numpy.array([ord(token) for token in swapped], dtype=numpy.uint16), numpy.array(scored, dtype=bool))


@torch.no_grad()
def score(engine: DeepSpeedEngine, text: Scored, length: int, batch: int) -> tuple[float, Tensor]:
    """Bits per byte of the scored positions, and the demand `[N, E]` of all positions, padding apart.

    Routers that choose at random (TopKGate's second expert) do so from a fixed seed, which leaves
    training's random state alone.

    Args:
        length: tokens a sequence.
        batch: sequences a pass, as in training, so that the capacity is the same.
    """
    engine.eval()
    nats, text_bytes, counts_NE = 0.0, 0, torch.zeros((), dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for tokens_BL, labels_BL, used_BL in _windows(text, length, batch):
            output = engine(tokens_BL, labels_BL, used_BL)
            nats += float(output.nats)
            text_bytes += int(((labels_BL != IGNORED) & (labels_BL != END)).sum())
            counts_NE = counts_NE + output.counts_NE
    engine.train()
    return nats / math.log(2) / text_bytes, counts_NE


def _windows(text: Scored, length: int, batch: int) -> DataLoader:
    tokens, counts = (Sequences(array, length, whole=False) for array in (text.tokens, text.counts))
    rows = []
    for index in range(len(tokens)):
        inputs, labels, used = tokens[index]
        rows.append((inputs, torch.where(counts[index][1] == 1, labels, IGNORED), used))
    columns: list[Tensor] = [torch.stack(column) for column in zip(*rows, strict=True)]
    return DataLoader(TensorDataset(*columns), batch_size=batch, generator=torch.Generator())
