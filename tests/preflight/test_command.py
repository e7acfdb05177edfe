"""The command as whole processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ssr_deepspeed.preflight", "--config", "tiny_cpu"]


def start(ranks, *arguments, environment=None, each=lambda rank: []):
    """Standard output, error and exit code of each rank, started by this process in torchrun's place."""
    # Its port is taken from now on: a free one that is only looked up may be gone when rank 0 comes to it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **(environment or {}),
    }
    processes = [
        subprocess.Popen(
            [*COMMAND, *arguments, *each(rank)],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_every_rank_ends_with_the_same_code_and_one_prints_the_table(cache, tmp_path):
    """A line for ssr-pretrain, with a configuration that one rank cannot load."""
    results = start(
        2,
        *("--output", str(tmp_path / "run"), "--resume", "--compare", "x", "--set", f"data.source={cache}/speeches"),
        each=lambda rank: ["--set", f"steps={rank}"],
    )
    assert [code for *_, code in results] == [1, 1]
    (first, error, _), (second, _, _) = results
    assert first.count("FAILURE  configuration  rank 0 (") == 1, error
    assert "steps = 0; allowed: at least 1" in first
    assert "ssr-preflight: 1 failed, " in first
    assert "ssr-preflight" not in second
    assert "Traceback" not in first + error


def test_a_task_of_a_scheduler_without_a_launcher_is_refused():
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"SLURM_NTASKS": "2"}
    result = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("ssr-preflight: SLURM_NTASKS = 2, but no RANK is set")


@pytest.mark.slow
def test_a_job_without_faults_passes_under_each_launcher(cache, tmp_path):
    bin_folder = os.path.dirname(sys.executable)
    line = ["--config", "tiny_cpu", "--output", str(tmp_path / "run"), "--set", f"data.source={cache}/speeches"]
    for launcher in (
        ["torchrun", "--standalone", "--nproc-per-node", "2", "-m"],
        ["accelerate", "launch", "--config_file", str(ROOT / "tests" / "examples" / "accelerate.yaml"), "-m"],
        ["deepspeed", "--num_gpus", "2", "--module"],
    ):
        command = [os.path.join(bin_folder, launcher[0]), *launcher[1:], "ssr_deepspeed.preflight", *line]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("2 joined on 1 host") == 1
        assert "FAILURE" not in result.stdout
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_under_deepspeeds_launcher_the_hostfile_is_told_to_both(tmp_path):
    """The launcher hands on what stands behind the module's name, and starts this machine alone without the file."""
    there, missing = tmp_path / "hosts", tmp_path / "hots"
    there.write_text("localhost slots=2\n")
    for file, told in ((there, "2 joined on 1 host"), (missing, f"there is no hostfile {missing}: ")):
        launcher = [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--hostfile", str(file)]
        # Both ways it asks no other machine for anything.
        launcher += ["--no_ssh", "--node_rank", "0"] if file is there else ["--num_gpus", "2"]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", "29537", "--module"]
        command = [*launcher, "ssr_deepspeed.preflight", "--hostfile", str(file), "--config", "tiny_cpu", "--quick"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
        assert (result.returncode == 0) == (file is there), result.stderr
        assert result.stdout.count(told) == 1, result.stdout


@pytest.mark.slow
def test_a_wrong_network_interface_ends_with_advice():
    for _, error, code in start(2, environment={"GLOO_SOCKET_IFNAME": "nowhere0"}):
        assert code == 1
        assert "GLOO_SOCKET_IFNAME (under NCCL also NCCL_SOCKET_IFNAME)" in error
        assert "Traceback" not in error


@pytest.mark.slow
def test_one_process_alone_checks_itself(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [*COMMAND, "--set", "model.ep_size=1", "--quick"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "1 joined on 1 host" in result.stdout
    assert "every rank holds all experts" in result.stdout
