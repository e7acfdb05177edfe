"""The run of launch/pretrain.sh under `deepspeed --hostfile` and `accelerate launch`, on two machines."""

import os
import subprocess

import pytest
import yaml

from tests.launch.hosts import NEEDS_NETWORKS, TwoHosts
from tests.launch.runs import ROOT, alone, arguments, environment, finish, losses

CONFIG = ROOT / "launch" / "accelerate.yaml"


def commands(launcher, folder):
    """What starts the run on each of two machines, one rank on each: the files of launch/, with our hosts' names."""
    if launcher == "accelerate":
        options = ["--config_file", CONFIG, "--num_processes", "2", "--main_process_ip", "box0"]
        return [["accelerate", "launch", *options, "--machine_rank", str(k), "-m"] for k in (0, 1)]
    text = (ROOT / "launch" / "hostfile.example").read_text()
    (folder / "hostfile").write_text(text.replace("node", "box").replace("slots=8", "slots=1"))
    options = ["--hostfile", folder / "hostfile", "--no_ssh", "--master_addr", "box0", "--master_port", "29500"]
    return [["deepspeed", *options, "--node_rank", str(k), "--module"] for k in (0, 1)]


def test_the_files_are_what_their_launchers_read():
    from accelerate.commands.config.config_args import load_config_from_file
    from deepspeed.launcher.runner import fetch_hostfile

    pool = fetch_hostfile(str(ROOT / "launch" / "hostfile.example"))
    assert pool == {"node0": 8, "node1": 8}
    config = load_config_from_file(str(CONFIG))
    assert (config.num_machines, config.machine_rank, config.num_processes) == (2, 0, sum(pool.values()))
    assert config.main_process_ip in pool
    assert config.deepspeed_config == yaml.safe_load(CONFIG.read_text())["deepspeed_config"]


@pytest.mark.slow
@NEEDS_NETWORKS
def test_two_machines_train_under_either_launcher_as_under_the_script(cache, tmp_path):
    alone(*arguments(cache, tmp_path / "script", 6))
    for launcher in ("deepspeed", "accelerate"):
        run = tmp_path / launcher
        words = ["ssr_deepspeed.pretrain", *arguments(cache, run, 6, "ranks=2")]
        hosts = TwoHosts(f"oth{os.getpid()}_", tmp_path)
        try:
            logs = [tmp_path / f"{launcher}_{k}.log" for k in (0, 1)]
            both = zip(commands(launcher, tmp_path), logs, strict=True)
            started = [hosts.start(k, *command, *words, log=log) for k, (command, log) in enumerate(both)]
            finish(started, logs)
        finally:
            hosts.close()
        assert losses(run) == losses(tmp_path / "script"), launcher


@pytest.mark.slow
def test_a_missing_hostfile_is_an_error_where_the_run_says_how_many_ranks_it_has(cache, tmp_path):
    """DeepSpeed's launcher warns, and would train on this machine alone."""
    words = [*arguments(cache, tmp_path / "run", 6, "ranks=2", "model.ep_size=1")]
    options = ["--hostfile", tmp_path / "nowhere", "--num_gpus", "1", "--master_port", "29519", "--module"]
    result = subprocess.run(
        ["deepspeed", *options, "ssr_deepspeed.pretrain", *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode != 0
    assert "Unable to find hostfile" in result.stdout + result.stderr
    assert "ranks = 2, but 1 started: see that every machine is there" in result.stderr
    assert not (tmp_path / "run").exists()
