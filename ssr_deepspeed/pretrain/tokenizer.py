"""Documents to token arrays: bytes, or a byte-level BPE trained on the documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import tokenizers

END = "<|end|>"
FILE = "tokenizer.json"
_BYTE_END = 256


@dataclass(frozen=True)
class Encoder:
    """Tokenises documents; small enough to be sent to other processes."""

    bytes_per_token: list[int]
    """Bytes of text each token stands for; 0 for the end of a document."""
    end: int
    """The token after each document."""
    bpe: tokenizers.Tokenizer | None = None
    """None: tokens are bytes."""

    @property
    def vocabulary(self) -> int:
        return len(self.bytes_per_token)

    @property
    def dtype(self) -> numpy.dtype:
        return numpy.dtype(numpy.uint16 if self.vocabulary <= 2**16 else numpy.uint32)

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        """`[tokens]` of the documents in a row, an end token after each. Never more than bytes and documents."""
        if self.bpe is None:
            pieces = [numpy.frombuffer(text.encode(), dtype=numpy.uint8) for text in texts]
        else:
            encodings = self.bpe.encode_batch_fast(list(texts))
            pieces = [numpy.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]
        tokens = numpy.full(sum(map(len, pieces)) + len(pieces), self.end, dtype=self.dtype)
        start = 0
        for piece in pieces:
            tokens[start : start + len(piece)] = piece
            start += len(piece) + 1
        return tokens


def byte_encoder() -> Encoder:
    """A token for each byte, and one for the end of a document."""
    return Encoder([1] * 256 + [0], _BYTE_END)


def train_bpe(texts: Iterator[str], vocabulary: int, folder: Path) -> Encoder:
    """A byte-level BPE trained on `texts` and saved in `folder`."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    bpe.save(str(folder / FILE))
    end, size = bpe.token_to_id(END), bpe.get_vocab_size()
    # A byte-level token is written with one character for each of its bytes.
    lengths = [0 if token == end else len(bpe.id_to_token(token)) for token in range(size)]
    return Encoder(lengths, end, tokenizers.Tokenizer.from_file(str(folder / FILE)))


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the trained BPE in a prepared folder; "bytes" where there is none."""
    file = folder / FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "bytes"
