"""launch/pretrain.sh on two machines: two network namespaces, one rank each, real TCP between them."""

import os
import re
import signal

import psutil
import pytest
import torch

from tests.launch.hosts import NEEDS_NETWORKS, NETWORK, TwoHosts
from tests.launch.runs import SCRIPT, alone, arguments, finish, latest, losses, wait_for

pytestmark = [pytest.mark.slow, NEEDS_NETWORKS]


@pytest.fixture
def hosts(tmp_path):
    two = TwoHosts(f"ssr{os.getpid()}_", tmp_path)
    yield two
    two.close()


def start(hosts, folder, *words, meet="first", join=60, only=(0, 1), preflight=False):
    """The script on each of the hosts; the processes and their logs."""
    logs = [folder / f"{meet}_{k}.log" for k in (0, 1)]
    options = ["--nodes", "2", "--ranks-per-node", "1", "--rendezvous", "box0:29400", "--id", meet]
    options += [] if preflight else ["--no-preflight"]
    processes = []
    for k in only:
        command = [SCRIPT, *options, "--join-timeout", str(join), "--node-rank", str(k), *words]
        processes.append(hosts.start(k, *command, log=logs[k], DEEPSPEED_TIMEOUT="1"))
    return processes, logs


def same_weights(run, other, step):
    ours, theirs = (
        torch.load(folder / "checkpoints" / f"step_{step}" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        for folder in (run, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_machines_train_as_two_ranks_of_one_do(hosts, cache, tmp_path):
    """As printed in the README: with the preflight, and then once more with --resume."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    words = ["--log-dir", tmp_path / "logs"]
    finish(*start(hosts, tmp_path, *words, *arguments(cache, apart, 8), preflight=True))
    finish(*start(hosts, tmp_path, "--resume", *arguments(cache, apart, 12), meet="then", preflight=True))
    alone(*arguments(cache, together, 8))
    alone("--resume", *arguments(cache, together, 12))
    for meet in ("first", "then"):
        assert (tmp_path / f"{meet}_0.log").read_text().count("2 joined on 2 hosts") == 1
    assert list(losses(apart)) == list(range(1, 13))
    assert losses(apart) == losses(together)
    assert same_weights(apart, together, 12)
    for k in (0, 1):
        (said,) = (tmp_path / "logs" / f"node_{k}").glob("first-0_*/attempt_0/0/stdout.log")
        assert ("step 8/8" in said.read_text()) == (k == 0)
        assert said.with_name("stderr.log").exists()
    assert "[rank 0]: step 8/8" in (tmp_path / "first_0.log").read_text()
    assert "step 8/8" not in (tmp_path / "first_1.log").read_text()


def trained_to(step, hosts, folder, run, *words, **options):
    """Start, and wait for the checkpoint of a step."""
    processes, logs = start(hosts, folder, *words, **options)
    said = lambda: "\n".join(log.read_text()[-3000:] for log in logs)  # noqa: E731
    wait_for(lambda: latest(run) >= step or any(process.poll() for process in processes), 300, said)
    assert latest(run) >= step, said()
    return processes, said


def test_a_signal_to_the_script_of_one_machine_saves_the_same_step_on_both(hosts, cache, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    saved = 0
    for k, begins in ((1, []), (0, ["--resume"])):
        words = [*begins, *arguments(cache, run, 100_000)]
        processes, said = trained_to(saved + 20, hosts, tmp_path, run, *words, meet=f"signal_{k}")
        processes[k].send_signal(signal.SIGTERM)
        wait_for(lambda processes=processes: all(process.poll() is not None for process in processes), 120, said)
        assert [process.returncode for process in processes] == [75, 75], said()
        assert said().count("exit status 75: stopped by a signal, nothing is lost; go on with --resume") == 2
        wait_for(lambda: not hosts.processes(0) + hosts.processes(1), 10, lambda: "processes are left")
        saved = latest(run)
        assert f"stopped by SIGTERM after step {saved};" in said()
    finish(*start(hosts, tmp_path, "--resume", *arguments(cache, run, saved + 6), meet="end"))
    alone(*arguments(cache, whole, saved + 6))
    assert losses(run) == losses(whole)
    assert same_weights(run, whole, saved + 6)


@pytest.mark.parametrize("k", [0, 1])
def test_a_killed_rank_starts_both_machines_anew_where_restarts_are_allowed(k, hosts, cache, tmp_path):
    """The one that notices first has to wait for the other, at a place to meet that is still taken or is not yet."""
    run, whole, steps = tmp_path / "run", tmp_path / "whole", 120
    words = ["--max-restarts", "1", *arguments(cache, run, steps, "timeout=20")]
    processes, _ = trained_to(20, hosts, tmp_path, run, *words)
    mine = {number: psutil.Process(number).cmdline() for number in hosts.processes(k)}
    # torchrun's own command has its options before the module.
    (rank,) = (number for number, line in mine.items() if line[2:4] == ["-m", "ssr_deepspeed.pretrain"])
    os.kill(rank, signal.SIGKILL)
    logs = [tmp_path / f"first_{k}.log" for k in (0, 1)]
    finish(processes, logs)
    assert all("exit status 69; restart 1 of 1" in log.read_text() for log in logs)
    alone(*arguments(cache, whole, steps))
    assert losses(run) == losses(whole)
    assert same_weights(run, whole, steps)


def test_a_machine_cut_off_ends_both_and_the_run_goes_on_when_it_is_back(hosts, cache, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = arguments(cache, run, 100_000, "timeout=20")
    processes, said = trained_to(40, hosts, tmp_path, run, *words, join=20)
    logs = [tmp_path / f"first_{k}.log" for k in (0, 1)]
    hosts.cut_off(1)
    wait_for(lambda: all(process.poll() is not None for process in processes), 400, said)
    assert [process.returncode for process in processes] == [69, 69], said()
    # Each says whom it misses: by rank, by name, by address, or as the host of the meeting place.
    assert re.search(rf"rank 1 \(host box1\)|{NETWORK}\.2\b", logs[0].read_text()), said()
    assert re.search(rf"rank 0 \(host box0\)|{NETWORK}\.1\b|C10d store|out of reach", logs[1].read_text()), said()
    wait_for(lambda: not hosts.processes(0) + hosts.processes(1), 10, lambda: "processes are left")

    hosts.connect()
    saved = latest(run)
    assert saved >= 40
    finish(*start(hosts, tmp_path, "--resume", *arguments(cache, run, saved + 6), meet="again"))
    assert f"after step {saved} of {saved + 6}" in (tmp_path / "again_0.log").read_text()
    alone(*arguments(cache, whole, saved + 6))
    assert losses(run) == losses(whole)
    assert same_weights(run, whole, saved + 6)


@pytest.mark.parametrize("present", [0, 1])
def test_a_machine_that_never_joins_is_an_error_after_the_time_given(present, hosts, cache, tmp_path):
    run = tmp_path / "run"
    (process,), logs = start(hosts, tmp_path, *arguments(cache, run, 4), join=8, only=(present,))
    wait_for(lambda: process.poll() is not None, 120, logs[present].read_text)
    assert process.returncode == 1
    said = logs[present].read_text()
    assert "waiting at most 8 s until all 2 machines are at box0:29400" in said
    assert "RendezvousTimeoutError" in said if present == 0 else "(box0, 29400)" in said
    assert not run.exists()
    wait_for(lambda: not hosts.processes(present), 10, lambda: "processes are left")
