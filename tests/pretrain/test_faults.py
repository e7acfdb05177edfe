"""Faults injected into real processes under torchrun: what is lost, who is named, what is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.pretrain.test_train import records, timeless
from tests.pretrain.tiny import tiny_run

STEPS = 6
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
_FORWARD = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


class Job:
    """A run of two ranks under torchrun.

    Args:
        folder: of the test; the run's is `run` in it.
        settings: of the run, as `tiny_run` makes them.
        fault: what `faulty.py` is to do, on which rank, at which step.
        mark: of the environment, by which all processes of the job are found again.
    """

    def __init__(self, folder, settings, *options, fault=None, launcher=()):
        self.folder, self.mark = folder / "run", f"SSR_TEST_JOB={os.urandom(8).hex()}"
        self.exit_file = folder / "exit_code"
        self.exit_file.unlink(missing_ok=True)
        file = folder / "settings.json"
        file.write_text(json.dumps(settings.to_dict()))
        script = ["-m", "ssr_deepspeed.pretrain"]
        if fault:
            script = [str(Path(__file__).with_name("faulty.py")), *map(str, fault)]
        command = [*_TORCHRUN, *launcher, *script, "--config", str(file), "--output", str(self.folder), *options]
        name, value = self.mark.split("=")
        environment = {**os.environ, name: value, "SSR_EXIT_FILE": str(self.exit_file)}
        self.output = (folder / "output").open("w+")
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )

    def processes(self):
        """All processes of the job that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                name, value = self.mark.split("=")
                if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def workers(self):
        return [process for process in self.processes() if process.pid != self.process.pid]

    def text(self):
        self.output.flush()
        return Path(self.output.name).read_text()

    def end(self, timeout=300):
        """Wait for the end; torchrun's exit code, and the run's own. No process may be left."""
        try:
            code = self.process.wait(timeout)
            deadline = time.monotonic() + 60
            while self.processes():
                assert time.monotonic() < deadline, f"orphans: {self.processes()}\n{self.text()}"
                time.sleep(0.1)
        finally:
            for process in self.processes():
                process.kill()
        return code, int(self.exit_file.read_text()) if self.exit_file.exists() else None


def settings_of(cache, **changes):
    """Checkpoints and evaluations between records, every second step."""
    return tiny_run(
        cache,
        ssr={"rule": "carried", "noise": {"scale": 0.1}},
        steps=STEPS,
        **{"log_every": 3, "checkpoint_every": 2, "eval_every": 2, "eval_sequences": 0, **changes},
    )


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(folder, settings_of(cache))
    assert job.end() == (0, None), job.text()
    return folder / "run"


def assert_equal_records(folder, whole):
    for kind in ("train", "load", "experts", "evaluation"):
        assert [timeless(record) for record in records(folder, kind)] == [
            timeless(record) for record in records(whole, kind)
        ], kind


def assert_equal_runs(folder, whole):
    assert_equal_records(folder, whole)
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_4", "step_6"]
    assert (folder / "checkpoints" / "latest").read_text() == "step_6"


def assert_resumes(folder, cache, whole, first_step):
    job = Job(folder, settings_of(cache), "--resume")
    assert job.end() == (0, None), job.text()
    assert f"after step {first_step} of {STEPS}" in job.text()
    assert_equal_runs(job.folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "step", "resumes_after"),
    [
        ("killed in the step", 1, 5, 4),
        ("killed in the all-to-all", 1, 5, 4),
        ("killed while writing", 1, 4, 2),
        ("killed before the rename", 0, 4, 2),
        ("killed between rename and latest", 0, 4, 4),
    ],
)
def test_a_killed_rank_is_named_and_nothing_before_the_last_checkpoint_is_lost(
    cache, tmp_path, whole, fault, rank, step, resumes_after
):
    job = Job(tmp_path, settings_of(cache, timeout=40), fault=(fault, rank, step))
    code, own = job.end()
    assert code == 1
    assert own == 69, job.text()
    assert f": rank {rank} (host " in job.text()
    assert_resumes(tmp_path, cache, whole, resumes_after)


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_run_though_its_loader_outlives_signals(cache, tmp_path):
    job = Job(tmp_path, settings_of(cache, data={"workers": 1}), fault=("raises", 1, 5))
    assert job.end() == (1, 1), job.text()
    assert "MemoryError: a fault" in job.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "seconds", "words"),
    [
        ("frozen", r"1?\d", ["rank 1 (host ", "gone, frozen or cut off"]),
        # It is alive: nothing but the timeout tells.
        ("stalls", r"2\d", ["all ranks are alive", "in stall"]),
    ],
)
def test_a_rank_that_stands_still_is_told_of_and_the_others_exit(cache, tmp_path, whole, fault, seconds, words):
    job = Job(tmp_path, settings_of(cache, timeout=20), fault=(fault, 1, 5))
    code, own = job.end()
    assert (code, own) == (1, 69), job.text()
    assert re.search(rf"no progress for {seconds} s in step 5: {re.escape(words[0])}", job.text()), job.text()
    assert words[1] in job.text()
    assert_resumes(tmp_path, cache, whole, 4)


@pytest.mark.slow
def test_a_disk_that_is_full_on_one_rank_costs_one_checkpoint(cache, tmp_path, whole):
    job = Job(tmp_path, settings_of(cache), fault=("disk full", 1, 4))
    assert job.end() == (0, None), job.text()
    warning = "WARNING: the checkpoint of step 4 could not be written (rank 1, File too large)"
    assert job.text().count(warning) == 1, job.text()
    assert [path.name for path in sorted((job.folder / "checkpoints").glob("step_*"))] == ["step_2", "step_6"]
    assert_equal_records(job.folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_last_save_on_a_full_disk_exits_with_its_own_code(cache, tmp_path, whole, rank):
    job = Job(tmp_path, settings_of(cache), fault=("disk full", rank, STEPS))
    code, own = job.end()
    assert (code, own) == (1, 74), job.text()
    assert (job.folder / "checkpoints" / "latest").read_text() == "step_4"
    assert_resumes(tmp_path, cache, whole, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step", "saved", "code"),
    [
        ("SIGTERM in evaluation", 2, 2, 75),
        # Its own evaluation, and then the one at the end.
        ("SIGTERM in evaluation", 6, 6, 75),
        ("SIGTERM in a save", 4, 4, 75),
        # Heard at the end of the next step, whose evaluation is then owed; the next record is due two steps later.
        ("SIGUSR1", 3, 4, 75),
        ("SIGINT", 1, 2, 130),
    ],
)
def test_a_signal_to_one_rank_has_all_save_the_same_step(cache, tmp_path, whole, fault, step, saved, code):
    job = Job(tmp_path, settings_of(cache), fault=(fault, 1, step))
    assert job.end() == (1, code), job.text()
    name = fault.split()[0]
    assert f"stopped by {name} after step {saved}; go on with --resume" in job.text()
    assert (job.folder / "checkpoints" / "latest").read_text() == f"step_{saved}"
    assert_resumes(tmp_path, cache, whole, saved)


def signal_when_ready(job, send):
    deadline = time.monotonic() + 200
    while "ready" not in job.text():
        assert time.monotonic() < deadline and job.process.poll() is None, job.text()
        time.sleep(0.1)
    send()


@pytest.mark.slow
def test_sigusr1_to_torchrun_and_all_its_workers_at_once_is_one_signal(cache, tmp_path, whole):
    """As Slurm sends it."""
    job = Job(tmp_path, settings_of(cache), fault=("waits for a signal", 1, 3), launcher=_FORWARD)
    signal_when_ready(job, lambda: [process.send_signal(signal.SIGUSR1) for process in job.processes()])
    code, own = job.end()
    assert (code, own) == (1, 75), job.text()
    assert_resumes(tmp_path, cache, whole, 4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=["SIGKILL", "SIGUSR1, not handled"])
def test_workers_whose_torchrun_is_killed_save_and_leave_no_orphans(cache, tmp_path, whole, number):
    job = Job(tmp_path, settings_of(cache), fault=("waits for a signal", 1, 3))
    signal_when_ready(job, lambda: job.process.send_signal(number))
    code, own = job.end()
    assert (code, own) == (-number, 75), job.text()
    assert_resumes(tmp_path, cache, whole, 4)


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_in_a_checkpoint(cache, tmp_path, whole):
    """Also where loaders are processes of their own, which torchrun signals too."""
    job = Job(tmp_path, settings_of(cache, data={"workers": 1}), fault=("waits for a signal", 1, 3))
    signal_when_ready(job, lambda: job.process.send_signal(signal.SIGTERM))
    code, own = job.end()
    assert (code, own) == (1, 75), job.text()
    assert_resumes(tmp_path, cache, whole, 4)
