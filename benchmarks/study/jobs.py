"""Many independent runs, some at a time, each recorded once in a JSON-lines file.

The file is the state: a job whose description stands in it is done. So a study that was killed goes
on where it was, and a larger study on the same file runs only what is new.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tqdm import tqdm

from ssr_deepspeed.monitor.sinks import JsonLines, read_json_lines

Job = dict[str, Any]
Work = Callable[[Job], dict[str, Any]]

# Read when torch and DeepSpeed are imported, so a worker has them from its start.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_jobs(
    jobs: Iterable[Job], work: Work, path: Path, workers: int, deadline_minutes: float | None = None
) -> list[Job]:
    """Run the jobs that the file does not hold yet, in order, and append one line for each.

    A line is `{"job", "result", "date", "hardware"}`. A job that raises, or whose process dies, is
    reported on stderr and not recorded; the others go on.

    Args:
        jobs: JSON objects, each the whole description of a run; equal ones run once.
        work: a module-level function from a job to a JSON object without NaN or infinities.
        path: the JSON-lines file; made where it is missing.
        workers: processes, each with one torch thread.
        deadline_minutes: no job starts later than this after the call.

    Returns:
        The jobs that failed, for the command's exit status.

    Raises:
        ValueError: `workers` is below 1, a job is not JSON, or a line of the file is not.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}; allowed: at least 1")
    sink = JsonLines(path)  # first: a torn last line goes, and with it the belief that its job is done
    try:
        missing = _missing(jobs, path)
        deadline = math.inf if deadline_minutes is None else time.monotonic() + 60 * deadline_minutes
        print(f"{len(missing)} jobs to run, {workers} at a time, into {path}", flush=True)
        return _Pool(missing, work, sink, min(workers, len(missing)), deadline).run()
    finally:
        sink.close()


def hardware() -> str:
    """CPU model, number of cores and torch version, as every record names them."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, torch {importlib.metadata.version('torch')}"


def _missing(jobs: Iterable[Job], path: Path) -> list[Job]:
    done = {_key(record["job"]) for record in read_json_lines(path)}
    fresh = {_key(job): job for job in jobs}
    return [job for key, job in fresh.items() if key not in done]


def _key(job: Job) -> str:
    try:
        return json.dumps(job, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a job must be a JSON object, got {job!r}: {error}") from None


class _Worker:
    """A process that takes jobs through a pipe until the pipe closes."""

    def __init__(self, work: Work) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        with patch.dict(os.environ, _ENVIRONMENT):
            self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def receive(self) -> tuple[str | None, str]:
        """The result of its job as JSON, or None and what went wrong."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return None, f"its process ended with exit code {self.process.exitcode}\n"

    def close(self) -> None:
        self.pipe.close()
        if self.job is not None:  # in the middle of it
            self.process.kill()
        self.process.join()


def _serve(work: Work, pipe: Connection) -> None:
    """A worker's life: jobs in, results as JSON out."""
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = json.dumps(work(job), allow_nan=False), ""
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)


class _Pool:
    """Workers, the jobs still waiting for one, and where results go."""

    def __init__(self, jobs: list[Job], work: Work, sink: JsonLines, workers: int, deadline: float) -> None:
        self.jobs, self.count, self.sink, self.deadline = deque(jobs), len(jobs), sink, deadline
        self.work, self.workers, self.failed = work, workers, list[Job]()
        self.finished, self.began = 0, time.monotonic()

    def run(self) -> list[Job]:
        """Keep the workers busy until no job waits or the deadline passes; the jobs that failed."""
        busy: list[_Worker] = []
        idle = [_Worker(self.work) for _ in range(self.workers)]
        try:
            while True:
                while idle and self.jobs and time.monotonic() < self.deadline:
                    busy.append(idle.pop())
                    busy[-1].start(self.jobs.popleft())
                if not busy:
                    break
                ready = wait([worker.pipe for worker in busy])
                for worker in [worker for worker in busy if worker.pipe in ready]:
                    busy.remove(worker)
                    idle.append(self._settle(worker))
        finally:
            for worker in idle + busy:
                worker.close()
        if self.jobs:
            print(f"{len(self.jobs)} jobs are left for another call: the deadline has passed", flush=True)
        return self.failed

    def _settle(self, worker: _Worker) -> _Worker:
        """Record what a worker answers; the worker for the next job, another one where this one died."""
        result, problem = worker.receive()
        job, worker.job = worker.job, None
        assert job is not None
        self.finished += 1
        if result is None:
            self.failed.append(job)
            print(f"failed: {json.dumps(job)}\n{problem}", file=sys.stderr, flush=True)
        else:
            today = datetime.now(UTC).date().isoformat()
            self.sink.write({"job": job, "result": json.loads(result), "date": today, "hardware": hardware()})
        self._show(job)
        if worker.process.is_alive():
            return worker
        worker.close()
        return _Worker(self.work)

    def _show(self, job: Job) -> None:
        spent = time.monotonic() - self.began
        left = tqdm.format_interval(spent / self.finished * (self.count - self.finished))
        name = " ".join(str(value) for value in job.values() if isinstance(value, str | int | float))
        passed = tqdm.format_interval(spent)
        print(f"{self.finished}/{self.count} {name}  after {passed}, ETA {left}", flush=True)
