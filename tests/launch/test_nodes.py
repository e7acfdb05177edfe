"""launch/pretrain.sh on two machines: two network namespaces, one rank each, real TCP between them."""

import dataclasses
import os
import re

import pytest
import torch

from ssr_deepspeed.pretrain.config import RunConfig
from tests.launch.hosts import NEEDS_NETWORKS, NETWORK, TwoHosts
from tests.launch.runs import SCRIPT, alone, arguments, finish, latest, losses, wait_for

pytestmark = [pytest.mark.slow, NEEDS_NETWORKS]


@pytest.fixture
def hosts(tmp_path):
    two = TwoHosts(f"ssr{os.getpid()}_", tmp_path)
    yield two
    two.close()


def start(hosts, folder, *words, meet="first", join=60, only=(0, 1)):
    """The script on each of the hosts; the processes and their logs."""
    logs = [folder / f"{meet}_{k}.log" for k in (0, 1)]
    options = ["--nodes", "2", "--ranks-per-node", "1", "--rendezvous", "box0:29400", "--id", meet, "--no-preflight"]
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
    apart, together = tmp_path / "apart", tmp_path / "together"
    finish(*start(hosts, tmp_path, "--log-dir", tmp_path / "logs", *arguments(cache, apart, 12)))
    alone(*arguments(cache, together, 12))
    assert list(losses(apart)) == list(range(1, 13))
    assert losses(apart) == losses(together)
    assert same_weights(apart, together, 12)
    for k in (0, 1):
        (said,) = (tmp_path / "logs" / f"node_{k}").glob("first-0_*/attempt_0/0/stdout.log")
        assert ("step 12/12" in said.read_text()) == (k == 0)
        assert said.with_name("stderr.log").exists()
    assert "[rank 0]: step 12/12" in (tmp_path / "first_0.log").read_text()
    assert "step 12/12" not in (tmp_path / "first_1.log").read_text()


def test_a_machine_cut_off_ends_both_and_the_run_goes_on_when_it_is_back(hosts, cache, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    if "timeout" not in {field.name for field in dataclasses.fields(RunConfig)}:
        pytest.skip("without a time limit of its own, a rank that only waits for others waits half an hour")
    processes, logs = start(hosts, tmp_path, *arguments(cache, run, 100_000, "timeout=20"), join=20)
    said = lambda: "\n".join(log.read_text()[-3000:] for log in logs)  # noqa: E731
    wait_for(lambda: latest(run) >= 40 or any(process.poll() for process in processes), 300, said)
    assert latest(run) >= 40, said()
    hosts.cut_off(1)
    wait_for(lambda: all(process.poll() is not None for process in processes), 400, said)
    assert all(process.returncode for process in processes)
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
