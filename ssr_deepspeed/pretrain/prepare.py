"""Tokenise the text of a run once, in parallel, into memory-mapped shards that all ranks read.

    ssr-prepare --config tiny_cpu --workers 8 --output /shared/speeches

Without --output the text goes to where a run with the same configuration looks for it (data.cache);
with it, start the run with --set data.prepared=FOLDER. --verify reads all of a prepared folder again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy
from tqdm import tqdm

from ssr_deepspeed.pretrain.config import DataConfig, load_run
from ssr_deepspeed.pretrain.shards import (
    FORMAT,
    INDEX,
    SHARD_TOKENS,
    Index,
    Shard,
    check,
    read_index,
    settings_of,
    verify,
    write_index,
)
from ssr_deepspeed.pretrain.text import describe, document_bytes, read_documents, split_documents, version
from ssr_deepspeed.pretrain.tokenizer import Encoder, byte_encoder, tokenizer_hash, train_bpe

_BATCH = 2**20
"""Bytes of text that a process tokenises at a time. A BPE's encodings take a hundred times that."""


def prepare(
    config: DataConfig, *, workers: int = 1, output: Path | None = None, shard_tokens: int = SHARD_TOKENS
) -> Path:
    """The folder of the prepared text, made where it is not there; the same to the bit for all `workers`.

    Safe against a killed process, and against others that prepare the same at the same time: they wait.

    Args:
        workers: processes; 1 for this one alone.
        output: the folder; by default `data.prepared`, which must be there, or one in the cache.
        shard_tokens: most tokens of a shard.

    Raises:
        ValueError: the source cannot be used, the folder holds something else, or it cannot be written.
    """
    folder = output or locate(config, workers)
    if output is None and config.prepared is not None:
        read_index(folder)  # never made by a run
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / INDEX).exists())):
        raise ValueError(f"{folder} is there and holds no prepared text: remove it or name another folder")
    if not (folder / INDEX).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, wait_for=True):
            if not (folder / INDEX).exists():  # else the process that had the lock was first
                _remove_stale(folder)
                _build(config, folder, workers, shard_tokens)
    _check_source(check(folder, config), folder, config)
    return folder


def locate(config: DataConfig, workers: int = 1) -> Path:
    """The folder in which a run looks for its prepared text, whether it is there or not.

    `data.prepared`, or one in the cache, named by the settings and the source's names, sizes and times.

    Raises:
        ValueError: the source is not there.
    """
    if config.prepared is not None:
        return Path(config.prepared)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ssr_deepspeed"
    facts = json.dumps([FORMAT, SHARD_TOKENS, settings_of(config), version(config, workers)])
    return Path(config.cache or cache) / hashlib.sha256(facts.encode()).hexdigest()[:16]


def _check_source(index: Index, folder: Path, config: DataConfig) -> None:
    """A source that is in sight must be the one that was prepared; it may be out of sight."""
    try:
        there = describe(config)
    except ValueError:
        return
    if there != index.source:
        raise ValueError(
            f"{folder} was prepared from {index.source}, data.source = {config.source!r} is {there}: "
            "prepare another folder with ssr-prepare"
        )


def _build(config: DataConfig, folder: Path, workers: int, shard_tokens: int) -> None:
    building = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.building"
    building.mkdir()
    try:
        _write(config, building, workers, shard_tokens)
        building.rename(folder)
    except OSError as error:  # of a full disk first of all; a process of the pool says no more than this
        raise ValueError(f"the text cannot be prepared in {folder}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(config: DataConfig, folder: Path, workers: int, shard_tokens: int) -> None:
    recorded = describe(config)
    documents = read_documents(config, folder / "copy", workers)
    sizes = document_bytes(documents)
    training, heldout = split_documents(len(documents), config.heldout, config.seed)
    encoder = byte_encoder()
    if config.tokenizer == "bpe":
        sample = training[: max(1, int(numpy.searchsorted(sizes[training].cumsum(), config.tokenizer_sample, "right")))]
        encoder = train_bpe(_texts(documents, sample, sizes[sample]), config.vocabulary, folder)
    rows = {"training": training, "heldout": heldout}
    jobs = [job for name, part in rows.items() for job in _jobs(name, part, sizes[part], shard_tokens)]
    written = _tokenise(_Tokeniser(documents, encoder, folder), jobs, int(sizes.sum()) + len(sizes), workers)
    del documents  # its copy is mapped
    parts = {name: [shard for shard in written if shard.file.startswith(name)] for name in rows}
    index = Index(
        settings_of(config), recorded, tokenizer_hash(folder), encoder.dtype.name, encoder.bytes_per_token, **parts
    )
    if describe(config) != recorded:
        raise ValueError(f"data.source = {config.source!r} changed while it was prepared: start again")
    for name in ("copy", "plan"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_index(folder, index)


@dataclass(frozen=True)
class _Job:
    """A shard to write."""

    file: str
    rows: numpy.ndarray
    """int64 `[documents]`, their numbers in the source."""
    sizes: numpy.ndarray
    """int64 `[documents]`, bytes."""


def _jobs(name: str, rows: numpy.ndarray, sizes: numpy.ndarray, shard_tokens: int) -> list[_Job]:
    """Shards of whole documents. A document has at most a token for each byte and one for its end."""
    jobs: list[_Job] = []
    ends, start = (sizes + 1).cumsum(), 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(numpy.searchsorted(ends, before + shard_tokens, side="right")))
        jobs.append(_Job(f"{name}_{len(jobs):05}.bin", rows[start:stop], sizes[start:stop]))
        start = stop
    return jobs


@dataclass(frozen=True)
class _Tokeniser:
    documents: datasets.Dataset
    encoder: Encoder
    folder: Path

    def write(self, job: _Job, advance: Callable[[int], Any]) -> Shard:
        """Write one shard; `advance` is told of each batch's bytes and documents."""
        digest, count = hashlib.sha256(), 0
        with (self.folder / job.file).open("wb") as file:
            for texts, weight in _batches(self.documents, job.rows, job.sizes):
                tokens = self.encoder.encode(texts)
                content = tokens.tobytes()
                file.write(content)
                digest.update(content)
                count += len(tokens)
                advance(weight)
            file.flush()
            os.fsync(file.fileno())
        return Shard(job.file, count, digest.hexdigest())


def _batches(documents: datasets.Dataset, rows: numpy.ndarray, sizes: numpy.ndarray) -> Iterator[tuple[list[str], int]]:
    """Texts of about `_BATCH` bytes, or of one longer document, and their bytes with one more for each."""
    (column,) = documents.column_names
    ends = (sizes + 1).cumsum()
    cuts = numpy.flatnonzero(numpy.diff(ends // _BATCH)) + 1
    for batch, weights in zip(numpy.split(rows, cuts), numpy.split(sizes + 1, cuts), strict=True):
        yield documents[batch.tolist()][column], int(weights.sum())


def _texts(documents: datasets.Dataset, rows: numpy.ndarray, sizes: numpy.ndarray) -> Iterator[str]:
    with _bar(int(sizes.sum()) + len(sizes), "training the tokenizer") as bar:
        for texts, weight in _batches(documents, rows, sizes):
            yield from texts
            bar.update(weight)


def _bar(total: int, what: str) -> tqdm:
    # Into a log file, a line now and then, and none for what takes seconds.
    quiet = {} if sys.stderr.isatty() else {"mininterval": 30, "delay": 10}
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, **quiet)


def _tokenise(tokeniser: _Tokeniser, jobs: list[_Job], total: int, workers: int) -> list[Shard]:
    """Write all shards; what they hold, in the order of the jobs."""
    with _bar(total, "tokenising") as bar:
        if workers == 1:
            return [tokeniser.write(job, bar.update) for job in jobs]
        # Not forked: a parent with threads (of torch, of the tokenizer, of an accelerator) must not be.
        context = multiprocessing.get_context("spawn")
        # A number for each shard, and no lock that a killed process could keep. What is larger goes through
        # files: a write into a pipe would wait for ever for a process that was killed before it read all.
        done = context.RawArray("q", len(jobs))
        plan = tokeniser.folder / "plan"
        plan.mkdir()
        for name, item in (("tokeniser", tokeniser), *enumerate(jobs)):
            (plan / str(name)).write_bytes(pickle.dumps(item))
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (plan, done))
        try:
            pending = calls = [pool.submit(_write_shard, number) for number in range(len(jobs))]
            while pending:
                finished, rest = wait(pending, timeout=0.5)
                pending = list(rest)
                bar.update(sum(done) - bar.n)
                for call in finished:
                    call.result()
            return [call.result() for call in calls]
        except BaseException as error:
            # Also a process that was being started when another died, for which the pool would wait for ever.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ValueError(
                    "a process that tokenises was killed, perhaps for want of memory: take fewer --workers"
                ) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[_Tokeniser, Path, Any]
"""Of a process of the pool: what writes shards, the folder of the plan, and the bytes done of each shard."""


def _start(plan: Path, done: Any) -> None:
    """Begin a process of the pool."""
    global _worker
    _worker = pickle.loads((plan / "tokeniser").read_bytes()), plan, done
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    # The pool's processes would outlive a killed parent.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(number: int) -> Shard:
    tokeniser, plan, done = _worker

    def advance(count: int) -> None:
        done[number] += count

    return tokeniser.write(pickle.loads((plan / str(number)).read_bytes()), advance)


@contextlib.contextmanager
def _lock(folder: Path, wait_for: bool) -> Iterator[bool]:
    """Be the only process that prepares `folder`; whether it is. The system frees a dead process's lock.

    Raises:
        ValueError: the file system has no locks.
    """
    path = folder.parent / f".{folder.name}.lock"
    file = _take(path, wait_for)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _take(path: Path, wait_for: bool) -> TextIO | None:
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait_for:
                file.close()
                return None
            print(f"waiting for the process that holds {path}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            raise ValueError(
                f"{path} cannot be locked ({error.strerror}): prepare the text with ssr-prepare on a file system "
                "that has locks, copy the folder here and name it in data.prepared"
            ) from None
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its holder removed it before it was ours


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left beside `folder`, whose lock this process holds."""
    for building in folder.parent.glob(".*.building"):
        name = building.name[1:].rsplit(".", 2)[0]
        with contextlib.nullcontext(True) if name == folder.name else _lock(folder.parent / name, False) as ours:
            if ours:
                shutil.rmtree(building, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `ssr-prepare`."""
    options = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        datasets.utils.logging.disable_progress_bar()
    try:
        if options.workers < 1:
            raise ValueError(f"--workers {options.workers}; allowed: at least 1")
        config = load_run(options.config, options.set).data
        folder = options.output or locate(config, options.workers)
        if options.verify:
            index = verify(folder)
            check(folder, config)
        else:
            index = read_index(prepare(config, workers=options.workers, output=folder))
    except datasets.exceptions.DatasetsError as error:
        sys.exit(f"ssr-prepare: {error}: {_reason(error)}")
    except (ValueError, OSError) as error:
        sys.exit(f"ssr-prepare: {error}")
    training, heldout = (sum(shard.tokens for shard in part) for part in (index.training, index.heldout))
    state = "verified" if options.verify else "prepared"
    print(f"{state} {training:,} training and {heldout:,} held-out tokens in {len(index.shards)} shards")
    print(f"folder {folder}\nfingerprint {index.fingerprint}")


def _reason(error: BaseException) -> str:
    """What went wrong below, which an error from another process holds as the text of a traceback."""
    lines = str(error.__cause__).splitlines()
    return next((line for line in lines if re.match(r"[\w.]+Error: ", line)), lines[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ssr-prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="run file (JSON), or the name of one that comes with the package"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, as in data.tokenizer=bpe"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="processes (by default one for each core this command may use); the result is the same for all",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="put the prepared text here")
    parser.add_argument("--verify", action="store_true", help="prepare nothing, but compare every shard with its hash")
    return parser


if __name__ == "__main__":
    main()
