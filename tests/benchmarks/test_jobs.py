"""Jobs run once each, whatever kills the command or a worker."""

import json
import os
import signal

import pytest

from benchmarks.study.jobs import run_jobs
from ssr_deepspeed.monitor.sinks import read_json_lines


def work(job):
    with open(job["log"], "a") as log:
        log.write(f"{job['n']}\n")
    if job["n"] == "raises":
        raise RuntimeError("no such thing")
    if job["n"] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["n"] == "nan":
        return {"value": float("nan")}
    return {"value": job["n"] ** 2, "threads": os.environ["OMP_NUM_THREADS"]}


@pytest.fixture
def job(tmp_path):
    return lambda n: {"n": n, "log": str(tmp_path / "log")}


def started(tmp_path):
    return (tmp_path / "log").read_text().split()


def test_a_second_call_runs_only_what_is_new_in_the_order_given(tmp_path, job):
    path = tmp_path / "results" / "lines.jsonl"
    assert run_jobs([job(3), job(1), job(3)], work, path, workers=1) == []
    assert run_jobs([job(2), job(1), job(0)], work, path, workers=1) == []
    records = read_json_lines(path)
    assert [record["result"]["value"] for record in records] == [9, 1, 4, 0]
    assert records[0]["job"] == job(3)
    assert {"date", "hardware"} < set(records[0]) and "torch" in records[0]["hardware"]
    assert records[0]["result"]["threads"] == "1"
    assert started(tmp_path) == ["3", "1", "2", "0"]


@pytest.mark.parametrize("torn", [20, 1])
def test_a_torn_last_line_is_dropped_and_its_job_run_again(torn, tmp_path, job):
    path = tmp_path / "lines.jsonl"
    run_jobs([job(1), job(2)], work, path, workers=1)
    path.write_bytes(path.read_bytes()[:-torn])  # without its newline alone, a line is torn as well
    run_jobs([job(1), job(2)], work, path, workers=1)
    assert [record["result"]["value"] for record in read_json_lines(path)] == [1, 4]
    assert started(tmp_path) == ["1", "2", "2"]


def test_a_job_that_raises_or_kills_its_process_loses_no_other(tmp_path, job, capfd):
    path = tmp_path / "lines.jsonl"
    names = [1, "raises", "dies", "nan", 2, 3]
    failed = run_jobs([job(n) for n in names], work, path, workers=2)
    assert sorted(f["n"] for f in failed) == ["dies", "nan", "raises"]
    assert sorted(record["job"]["n"] for record in read_json_lines(path)) == [1, 2, 3]
    errors = capfd.readouterr().err
    assert "RuntimeError: no such thing" in errors and "exit code -9" in errors
    assert json.dumps(job("raises")) in errors


def test_after_the_deadline_no_job_starts(tmp_path, job, capfd):
    path = tmp_path / "lines.jsonl"
    assert run_jobs([job(1)], work, path, workers=1, deadline_minutes=0) == []
    assert read_json_lines(path) == []
    assert "1 jobs are left" in capfd.readouterr().out


def test_no_workers_and_jobs_that_are_not_json_are_refused(tmp_path, job):
    with pytest.raises(ValueError, match="workers = 0"):
        run_jobs([job(1)], work, tmp_path / "lines.jsonl", workers=0)
    with pytest.raises(ValueError, match="must be a JSON object"):
        run_jobs([{"path": tmp_path}], work, tmp_path / "lines.jsonl", workers=1)
