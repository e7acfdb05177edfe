"""Prepared tokens to batches of packed sequences.

The position in the data is the number of samples that all ranks have taken. A batch is a pure function
of it, so a resumed run goes on at the exact sample, on whatever number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssr_deepspeed.pretrain.config import DataConfig
from ssr_deepspeed.pretrain.model import IGNORED
from ssr_deepspeed.pretrain.shards import Tokens, check
from ssr_deepspeed.pretrain.signals import outlive_signals

_BLOCK = 2**20


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, ready on disk."""

    training: numpy.ndarray | Tokens
    """uint16 or uint32 `[tokens]`, memory-mapped."""
    heldout: numpy.ndarray | Tokens
    vocabulary: int
    bytes_per_token: Tensor
    """int64 `[vocabulary]`: bytes of text each token stands for; 0 for the end of a document."""
    fingerprint: str = ""
    """Of the tokens, as in the index of a prepared folder."""


def open_corpus(folder: Path, config: DataConfig) -> Corpus:
    """Map a prepared folder into memory.

    Raises:
        ValueError: it is not what `config` asks for, a shard is missing or has another size, the
            training text is shorter than one sequence, or there is no held-out text.
    """
    index = check(folder, config)
    training, heldout = (Tokens(folder, shards, index.dtype) for shards in (index.training, index.heldout))
    bytes_per_token = torch.tensor(index.bytes_per_token)
    corpus = Corpus(training, heldout, len(bytes_per_token), bytes_per_token, index.fingerprint)
    if len(training) <= config.sequence_length:
        raise ValueError(
            f"the training text has {len(training)} tokens, "
            f"less than one sequence of {config.sequence_length} and its end"
        )
    blocks = (heldout[start : start + _BLOCK] for start in range(1, len(heldout), _BLOCK))
    if not any(bytes_per_token[block.astype(numpy.int64)].any() for block in blocks):
        raise ValueError("the held-out documents are empty: raise data.heldout or change data.seed")
    return corpus


class Sequences(Dataset):
    """Fixed-length windows over a token array: `(tokens [L], labels [L], used [L])`.

    Windows do not overlap and leave no token out: where the array ends, the last is padded. Index
    -1 is a sequence of padding alone, for ranks that have fewer sequences than others.
    """

    def __init__(self, tokens: numpy.ndarray | Tokens, length: int, whole: bool) -> None:
        targets = max(len(tokens) - 1, 0)
        self.tokens, self.length = tokens, length
        self.count = targets // length if whole else -(-targets // length)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        start = index * self.length if index >= 0 else len(self.tokens)
        window = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(numpy.int64))
        targets = max(len(window) - 1, 0)
        tokens = torch.zeros(self.length, dtype=torch.int64)
        labels = torch.full((self.length,), IGNORED)
        tokens[:targets], labels[:targets] = window[:-1], window[1:]
        return tokens, labels, torch.arange(self.length) < targets


def epoch_order(count: int, seed: int, epoch: int) -> numpy.ndarray:
    """The order of an epoch: a permutation `[count]` of int32, or of int64 where that is too small.

    Drawn without a list of Python integers: 4 bytes a sequence and rank.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    dtype = torch.int32 if count < 2**31 else torch.int64
    return torch.randperm(count, generator=generator, dtype=dtype).numpy()


def training_batches(
    corpus: Corpus, config: DataConfig, *, first_sample: int, micro_batch: int, rank: int, ranks: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless micro-batches of this rank from sample `first_sample` of the run on.

    Sample n of the run is place `n mod N` of epoch `n // N`, whose order is a seeded permutation of
    the N sequences; each micro-batch of all ranks together takes consecutive samples. So any number
    of ranks with any batch size goes on where another stopped.

    Args:
        first_sample: sequences that all ranks together have taken so far.
        micro_batch: sequences of this rank in one batch, as many as of each other.
    """
    sequences = Sequences(corpus.training, config.sequence_length, whole=True)

    def indices() -> Iterator[list[int]]:
        sample = first_sample + rank * micro_batch
        epoch, order = -1, numpy.empty(0)
        while True:
            batch = []
            for number in range(sample, sample + micro_batch):
                if number // len(sequences) != epoch:
                    epoch = number // len(sequences)
                    order = epoch_order(len(sequences), config.seed, epoch)
                batch.append(int(order[number % len(sequences)]))
            yield batch
            sample += ranks * micro_batch

    return iter(_loader(sequences, batch_sampler=indices(), num_workers=config.workers))


def heldout_batches(
    corpus: Corpus, config: DataConfig, *, limit: int, micro_batch: int, rank: int, ranks: int
) -> DataLoader:
    """The held-out sequences of this rank, equally many batches on each rank.

    Args:
        limit: sequences over all ranks, evenly spread over the held-out text; 0 for all.
    """
    sequences = Sequences(corpus.heldout, config.sequence_length, whole=False)
    chosen: Sequence[int] = range(len(sequences))
    if 0 < limit < len(chosen):
        chosen = [place * len(sequences) // limit for place in range(limit)]
    batches = -(-len(chosen) // (ranks * micro_batch))
    mine = list(chosen[rank::ranks])
    mine += [-1] * (batches * micro_batch - len(mine))
    return _loader(sequences, batch_size=micro_batch, sampler=mine)


def _loader(sequences: Sequences, **options: Any) -> DataLoader:
    # With a generator of its own, a loader draws nothing from the global random state, which a
    # resumed run must find as the uninterrupted one does.
    pinned = get_accelerator().device_name() != "cpu"  # copied to the device without waiting for it
    return DataLoader(
        sequences, generator=torch.Generator(), worker_init_fn=outlive_signals, pin_memory=pinned, **options
    )
