"""Prepared text on disk: tokens in flat, memory-mapped shards, and the index that tells what they are.

A folder holds `index.json`, `training_00000.bin`, ..., `heldout_00000.bin`, ..., and for a BPE
`tokenizer.json`. It appears under its name only when all of it is written. Sequences are cut out when
they are read, so one folder serves every sequence length.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm

from ssr_deepspeed.pretrain.config import DataConfig
from ssr_deepspeed.pretrain.tokenizer import tokenizer_hash

INDEX = "index.json"
FORMAT = 1
SHARD_TOKENS = 2**27
"""Most tokens of a shard: 256 MiB of uint16. One document that is longer has a shard of its own."""
_BLOCK = 2**24


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a prepared folder holds."""

    settings: dict[str, Any]
    """The keys of `DataConfig` that decide which tokens there are."""
    source: dict[str, Any]
    """Files, bytes, and a hash of names and sizes; or the name of a dataset."""
    tokenizer: str
    """SHA-256 of `tokenizer.json`, or "bytes"."""
    dtype: str
    bytes_per_token: list[int]
    training: list[Shard]
    heldout: list[Shard]

    @property
    def shards(self) -> list[Shard]:
        return [*self.training, *self.heldout]

    @property
    def fingerprint(self) -> str:
        """Of the tokens themselves, wherever the text came from: settings, tokenizer, content of every shard."""
        parts = [[(shard.tokens, shard.sha256) for shard in part] for part in (self.training, self.heldout)]
        facts = json.dumps([FORMAT, self.settings, self.tokenizer, self.dtype, *parts], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The keys of a configuration that decide which tokens are prepared from a source."""
    keys = ["subset", "split", "column", "sample_by", "tokenizer", "heldout", "seed"]
    keys += ["vocabulary", "tokenizer_sample"] if config.tokenizer == "bpe" else []
    return {key: getattr(config, key) for key in keys}


def write_index(folder: Path, index: Index) -> None:
    facts = {"format": FORMAT, "fingerprint": index.fingerprint, **asdict(index)}
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_index(folder: Path) -> Index:
    """The index of a prepared folder.

    Raises:
        ValueError: there is none, it is of another format, or it was changed.
    """
    file = folder / INDEX
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts.pop("format") != FORMAT:
            raise ValueError(f"{file} is of another format than {FORMAT}: prepare the text anew with ssr-prepare")
        stored = facts.pop("fingerprint")
        parts = {name: [Shard(**shard) for shard in facts[name]] for name in ("training", "heldout")}
        index = Index(**{**facts, **parts})
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no prepared text in {folder}: make it with ssr-prepare --output {folder}") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no index of prepared text ({error!r}): {_again(folder)}") from None
    if index.fingerprint != stored:
        raise ValueError(f"{file} says fingerprint {stored}, its entries make {index.fingerprint}: {_again(folder)}")
    return index


def fingerprint(folder: Path) -> str:
    """The fingerprint of a prepared folder, 16 hexadecimal digits, from its index alone.

    Raises:
        ValueError: as `read_index`.
    """
    return read_index(folder).fingerprint


def check(folder: Path, config: DataConfig) -> Index:
    """The index of a prepared folder, when it is what `config` asks for and every shard has its size.

    Raises:
        ValueError: it is not, naming the setting or the file.
    """
    index = read_index(folder)
    wanted = settings_of(config)
    for key in sorted(wanted.keys() | index.settings.keys()):
        there, now = index.settings.get(key), wanted.get(key)
        if there != now:
            raise ValueError(
                f"{folder} was prepared with data.{key} = {there!r}, the configuration says {now!r}: "
                "set it so, or prepare another folder with ssr-prepare"
            )
    if config.fingerprint not in (None, index.fingerprint):
        raise ValueError(
            f"data.fingerprint = {config.fingerprint!r}, but the text in {folder} has {index.fingerprint!r}: "
            "give the text of the former, or start a new run without that key"
        )
    for shard in index.shards:
        file = folder / shard.file
        size, right = file.stat().st_size if file.is_file() else None, shard.tokens * numpy.dtype(index.dtype).itemsize
        if size != right:
            state = "is missing" if size is None else f"has {size} bytes instead of {right}"
            raise ValueError(f"{file} {state}: {_again(folder)}")
    return index


def verify(folder: Path) -> Index:
    """Read all of a prepared folder and compare its content with the index.

    Raises:
        ValueError: a file is missing or is not what was written.
    """
    index = read_index(folder)
    if tokenizer_hash(folder) != index.tokenizer:
        raise ValueError(f"the tokenizer in {folder} is not the one its tokens were made with: {_again(folder)}")
    for shard in tqdm(index.shards, desc="verifying", unit="shard", disable=None):
        file, digest = folder / shard.file, hashlib.sha256()
        try:
            with file.open("rb") as content:
                while block := content.read(_BLOCK):
                    digest.update(block)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing: {_again(folder)}") from None
        if digest.hexdigest() != shard.sha256:
            raise ValueError(f"{file} has not the content that was written: {_again(folder)}")
    return index


def _again(folder: Path) -> str:
    return f"remove {folder} and prepare it anew with ssr-prepare"


class Tokens:
    """The tokens of several shards as one array: `len(tokens)`, and `tokens[start:stop]` as an array.

    Shards are mapped when they are first read, and mapped anew in a process the object is sent to.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str) -> None:
        self.files = [folder / shard.file for shard in shards]
        self.dtype = dtype
        self.ends = numpy.cumsum([shard.tokens for shard in shards], dtype=numpy.int64)
        self._maps: dict[int, numpy.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, window: slice) -> numpy.ndarray:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in steps of 1, not {step}")
        pieces = []
        number = int(numpy.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin, end = (int(self.ends[number - 1]) if number else 0), int(self.ends[number])
            pieces.append(self._map(number)[start - begin : min(stop, end) - begin])
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else numpy.concatenate([numpy.empty(0, self.dtype), *pieces])

    def _map(self, number: int) -> numpy.ndarray:
        if number not in self._maps:
            self._maps[number] = numpy.memmap(self.files[number], dtype=self.dtype, mode="r")
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}
