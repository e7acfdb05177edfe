"""launch/pretrain.sh without ranks: what it would run, and what it refuses."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.runs import ROOT, RUN, SCRIPT, environment

TWO = ["--nodes", "2", "--rendezvous", "box0:29400", "--id", "first"]
SIGNALS = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "600"]


def script(*arguments, **variables):
    command = [str(SCRIPT), *arguments]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, check=False, timeout=60
    )


def dry(*arguments, **variables):
    """The commands that a dry run prints, in words."""
    result = script("--dry-run", *arguments, **variables)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def torchrun(*options, module="pretrain", nodes="1", ranks="2", threads="1", log=False, before=()):
    prefix = ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=[rank ${rank}]: "] if log else []
    words = ["env", f"OMP_NUM_THREADS={threads}", *prefix, "torchrun", "--nnodes", nodes, "--nproc-per-node", ranks]
    return [*words, "--max-restarts", "0", *SIGNALS, *options, "-m", f"ssr_deepspeed.{module}", *before, *RUN]


def meeting(port, run, patience, host=None):
    conf = f"join_timeout=600,read_timeout={patience}" + ("" if host is None else f",is_host={host}")
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"box0:{port}", "--rdzv-id", run, "--rdzv-conf", conf]


def test_one_machine_runs_the_preflight_and_the_training():
    assert dry(*RUN) == [torchrun("--standalone", module="preflight"), torchrun("--standalone")]
    assert dry(*RUN, "--no-preflight", RANKS="3") == [torchrun("--standalone", ranks="3")]
    assert dry("--ranks-per-node=gpu", *RUN, RANKS="3", OMP_NUM_THREADS="4")[1] == torchrun(
        "--standalone", ranks="gpu", threads="4"
    )


def test_two_machines_meet_under_one_id_and_the_preflight_at_the_next_port():
    first = [*meeting(29401, "first-preflight", 600, 1), "--log-dir", "logs/node_0", "--tee", "3"]
    then = [*meeting(29400, "first-0", 60, 1), "--log-dir", "logs/node_0", "--tee", "3"]
    common = {"nodes": "2", "ranks": "gpu", "log": True}
    expected = [torchrun(*first, module="preflight", **common), torchrun(*then, **common)]
    assert dry(*TWO, "--node-rank", "0", "--log-dir", "logs", *RUN) == expected
    # The options may stand anywhere.
    assert dry(*RUN[:3], "--log-dir=logs", *RUN[3:], *TWO, "--node-rank=0") == expected


def test_a_machine_without_a_number_leaves_it_to_torchrun_who_hosts():
    assert dry(*TWO, "--no-preflight", *RUN) == [torchrun(*meeting(29400, "first-0", 60), nodes="2", ranks="gpu")]


def test_another_address_of_this_machine_and_another_patience():
    (words,) = dry(*TWO, "--no-preflight", "--join-timeout", "30", "--local-addr", "10.0.0.2", *RUN)
    assert words[words.index("--local-addr") + 1] == "10.0.0.2"
    assert words[words.index("--rdzv-conf") + 1] == "join_timeout=30,read_timeout=30"


@pytest.mark.parametrize(
    "variables",
    [
        {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "box0", "MASTER_PORT": "29400", "RDZV_ID": "first"},
        {"SLURM_NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "box0", "MASTER_PORT": "29400", "SLURM_JOB_ID": "first"},
        # As the training operator sets them, with its RANK and WORLD_SIZE of pods.
        {
            "PET_NNODES": "2",
            "PET_NODE_RANK": "1",
            "PET_MASTER_ADDR": "box0",
            "PET_MASTER_PORT": "29400",
            "PET_NPROC_PER_NODE": "gpu",
            "RDZV_ID": "first",
            "RANK": "1",
            "WORLD_SIZE": "2",
        },
    ],
    ids=["plain", "slurm", "operator"],
)
def test_a_scheduler_may_say_all_of_it_in_variables(variables):
    expected = torchrun(*meeting(29400, "first-0", 60, 0), nodes="2", ranks="gpu")
    assert dry("--no-preflight", *RUN, **variables) == [expected]


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--nodes", "2"], {}, "give --rendezvous HOST:PORT, or set MASTER_ADDR and MASTER_PORT"),
        (["--nodes", "2", "--rendezvous", "box0:29400"], {}, "--nodes 2 needs --id ID"),
        ([*TWO[:3], "box0", *TWO[4:]], {}, "--rendezvous (or MASTER_ADDR:MASTER_PORT) = box0; allowed: HOST:PORT"),
        ([*TWO[:3], "box0:65535", *TWO[4:]], {}, "a port from 1 to 65534"),
        ([], {"NNODES": "2", "MASTER_ADDR": "box0", "RDZV_ID": "x"}, "= box0:; allowed: HOST:PORT"),
        ([], {"NNODES": "2", "MASTER_PORT": "29400", "RDZV_ID": "x"}, "= :29400; allowed: HOST:PORT"),
        ([], {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}, "give --rendezvous"),
        ([], {"WORLD_SIZE": "16", "RANK": "0"}, "WORLD_SIZE = 16, but nothing tells of how many machines"),
        ([], {"NODE_RANK": "1"}, "--node-rank = 1; allowed: 0 to 0, for --nodes 1"),
        (TWO[2:], {}, "give --nodes N too"),
        ([*TWO, "--node-rank", "2"], {}, "--node-rank = 2; allowed: 0 to 1, for --nodes 2"),
        ([*TWO[:-1], "a/b"], {}, "--id = a/b; allowed: letters, digits"),
        (["--nodes", "1:4"], {}, "--nodes = 1:4; allowed: whole numbers, at least 1"),
        (["--nodes", "0"], {}, "--nodes = 0; allowed"),
        (["--ranks-per-node", "tpu"], {}, "--ranks-per-node = tpu; allowed"),
        ([], {"RANKS": "two"}, "--ranks-per-node = two"),
        (["--max-restarts", "-1"], {}, "--max-restarts = -1"),
        (["--id"], {}, "--id needs a value"),
        (["--log-dir", "--resume"], {}, "--log-dir needs a value"),
    ],
)
def test_half_a_specification_is_an_error_that_says_what_to_give(arguments, variables, words):
    result = script("--dry-run", *RUN, *arguments, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith("pretrain.sh: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not result.stdout


def test_a_link_to_the_script_finds_the_rest_of_it(tmp_path):
    link = tmp_path / "pretrain"
    link.symlink_to(SCRIPT)
    assert (
        subprocess.run([link, "--help"], capture_output=True, text=True, check=True).stdout == script("--help").stdout
    )


def test_help_names_every_option_that_the_script_reads_and_the_preflight_gets_its_own():
    text = script("--help").stdout
    case = next(line for line in SCRIPT.read_text().splitlines() if "| --node-rank" in line)
    checks = ["--expect-ranks", "--hostfile"]
    for option in [*case.strip(" )").split(" | "), "--no-preflight", "--dry-run"]:
        assert option in checks or f"\n  {option} " in text
    assert "\n  --quick, --expect-ranks N, --hostfile FILE " in text
    preflight, training = dry("--quick", *RUN, "--hostfile", "hosts", "--expect-ranks=8")
    assert preflight == torchrun(
        "--standalone", module="preflight", before=["--quick", "--hostfile", "hosts", "--expect-ranks", "8"]
    )
    assert training == torchrun("--standalone")
    assert max(len(line) for line in text.splitlines()) <= 120


SCRIPTS = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / "patches" / "apply.sh", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_shellcheck_finds_nothing(file):
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not found:
        pytest.skip("shellcheck is not installed; `make setup` brings it")
    result = subprocess.run(
        [found, "--external-sources", "--enable=quote-safe-variables", file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
