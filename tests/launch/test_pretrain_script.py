"""launch/pretrain.sh without ranks: what it would run, what it refuses, how signals and exit statuses pass through."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.runs import ROOT, SCRIPT, environment, heed_signals, wait_for

RUN = ["--config", "tiny_cpu", "--output", "runs/a b", "--set", "steps=4"]
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


def torchrun(*options, module="pretrain", nodes="1", ranks="2", threads="1", log=False):
    prefix = ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=[rank ${rank}]: "] if log else []
    words = ["env", f"OMP_NUM_THREADS={threads}", *prefix, "torchrun", "--nnodes", nodes, "--nproc-per-node", ranks]
    return [*words, "--max-restarts", "0", *SIGNALS, *options, "-m", f"ssr_deepspeed.{module}", *RUN]


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


def test_help_names_every_option_that_the_script_reads():
    text = script("--help").stdout
    case = next(line for line in SCRIPT.read_text().splitlines() if "| --node-rank" in line)
    for option in [*case.strip(" )").split(" | "), "--no-preflight", "--dry-run"]:
        assert f"\n  {option} " in text
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.fixture
def fake(tmp_path):
    """Runs the script with a torchrun of our own: it notes its arguments and then does as `behaviour`, in bash."""
    (tmp_path / "launch").mkdir()
    shutil.copy(SCRIPT, tmp_path / "launch")  # away from a .venv beside the real one
    program = tmp_path / "bin" / "torchrun"
    program.parent.mkdir()

    def start(behaviour, *arguments, **options):
        program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>{tmp_path}/calls\n{behaviour}\n')
        program.chmod(0o755)
        variables = environment(PATH=f"{program.parent}:{os.environ['PATH']}")
        command = [str(tmp_path / "launch" / "pretrain.sh"), *arguments, *RUN]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=variables, preexec_fn=heed_signals, **pipes, **options)

    return start


def calls(tmp_path):
    file = tmp_path / "calls"
    return [line.split(" -m ")[1] for line in file.read_text().splitlines()] if file.exists() else []


RAN = "ssr_deepspeed.pretrain " + " ".join(RUN)


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ('touch "$SSR_EXIT_FILE.begun"; echo 75 >"$SSR_EXIT_FILE"; exit 1', 75),
        # One rank fails at the start, and torchrun ends the others with SIGTERM.
        ('echo 75 >"$SSR_EXIT_FILE"; exit 1', 1),
        ('echo 74 >"$SSR_EXIT_FILE"; exit 1', 74),
        # Killed, while training: by the system for its memory, or by NCCL.
        ('touch "$SSR_EXIT_FILE.begun"; exit 1', 69),
        ('touch "$SSR_EXIT_FILE.begun"; echo 1 >"$SSR_EXIT_FILE"; exit 1', 1),
        ('touch "$SSR_EXIT_FILE.begun"; exit 0', 0),
    ],
)
def test_the_status_is_the_ranks_own_where_they_left_one(behaviour, status, fake, tmp_path):
    process = fake(behaviour, "--no-preflight", "--max-restarts", "0")
    process.communicate(timeout=60)
    assert process.returncode == status
    assert calls(tmp_path) == [RAN]


def test_a_failed_preflight_keeps_the_training_from_starting(fake, tmp_path):
    process = fake("[[ $* == *preflight* ]] && exit 3; exit 0")
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert calls(tmp_path) == [RAN.replace("pretrain", "preflight")]


def test_a_restart_resumes_and_never_overwrites(fake, tmp_path):
    process = fake('echo 69 >"$SSR_EXIT_FILE"; exit 1', "--no-preflight", "--max-restarts", "2", "--overwrite")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 69
    started = "ssr_deepspeed.pretrain --overwrite " + " ".join(RUN)
    assert calls(tmp_path) == [started, f"{RAN} --resume", f"{RAN} --resume"]
    assert "exit status 69; restart 2 of 2" in errors


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "weights"], ["--resume=weights"]])
def test_a_restart_resumes_as_the_first_start_did(resume, fake, tmp_path):
    """There may be no checkpoint of the new layout yet, and `weights` takes one of its own whole."""
    process = fake("exit 1", "--no-preflight", "--max-restarts", "1", *resume)
    process.communicate(timeout=60)
    run = " ".join(["ssr_deepspeed.pretrain", *resume, *RUN])
    assert calls(tmp_path) == [run, run]


@pytest.mark.parametrize("status", [2, 74, 75, 130])
def test_what_a_restart_cannot_mend_ends_at_once(status, fake, tmp_path):
    behaviour = f'touch "$SSR_EXIT_FILE.begun"; echo {status} >"$SSR_EXIT_FILE"; exit 1'
    process = fake(behaviour, "--no-preflight", "--max-restarts", "5")
    process.communicate(timeout=60)
    assert process.returncode == status
    assert calls(tmp_path) == [RAN]


@pytest.mark.parametrize(
    ("number", "saves", "status"),
    [
        (signal.SIGTERM, True, 75),
        (signal.SIGUSR1, True, 75),
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, False, 75),
        (signal.SIGINT, False, 130),
        (signal.SIGHUP, True, 75),
    ],
)
def test_a_signal_reaches_torchrun_and_the_script_waits_for_it(number, saves, status, fake, tmp_path):
    """Sent twice, as Slurm and a person do; it arrives once, and what torchrun does then is waited for."""
    name = number.name.removeprefix("SIG").replace("HUP", "TERM")
    save = f'echo {status} >"$SSR_EXIT_FILE"' if saves else ":"
    behaviour = (
        f"trap 'echo {name} >>{tmp_path}/signals; sleep 0.1; touch {tmp_path}/saved; {save}; exit 1' {name}\n"
        f"touch {tmp_path}/ready; while :; do sleep 0.05; done"
    )
    process = fake(behaviour, "--no-preflight", "--max-restarts", "3")
    wait_for((tmp_path / "ready").exists, 30, process.poll)
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert (tmp_path / "signals").read_text() == f"{name}\n"
    assert (tmp_path / "saved").exists()
    assert calls(tmp_path) == [RAN]
    assert ("before there was anything to save" in errors) == (not saves)


HOLD = "; while :; do sleep 0.05; done"


def signalled(process, tmp_path, number):
    wait_for((tmp_path / "ready").exists, 30, process.poll)
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ('echo 1 >"$SSR_EXIT_FILE"; exit 1', 1, ""),
        ('echo 143 >"$SSR_EXIT_FILE"; exit 1', 143, ""),
        ("kill -KILL $$", 137, "torchrun ended with 137, and its ranks left no word"),
        ("trap - TERM; kill $$", 75, "before there was anything to save"),
        # As torchrun's own patience does, here of one second.
        ("sleep 1.5; exit 1", 69, "no rank has saved"),
    ],
)
def test_an_error_after_a_signal_is_not_taken_for_a_save(end, status, words, fake, tmp_path):
    """Nor does it start anew: it was asked to end."""
    script = tmp_path / "launch" / "pretrain.sh"
    seconds = "1" if "sleep" in end else "600"
    script.write_text(script.read_text().replace("shutdown_timeout=600", f"shutdown_timeout={seconds}"))
    process = fake(f"trap '{end}' TERM; touch {tmp_path}/ready{HOLD}", "--no-preflight", "--max-restarts", "3")
    errors = signalled(process, tmp_path, signal.SIGTERM)
    assert process.returncode == status, errors
    assert words in errors
    assert ("pretrain.sh: " in errors) == bool(words)
    assert calls(tmp_path) == [RAN]


def test_a_second_signal_that_ends_the_run_at_once_is_not_taken_for_a_save(fake, tmp_path):
    behaviour = f"trap 'touch {tmp_path}/ready' TERM; trap 'exit 1' USR1; touch {tmp_path}/started{HOLD}"
    process = fake(behaviour, "--no-preflight")
    wait_for((tmp_path / "started").exists, 30, process.poll)
    process.send_signal(signal.SIGTERM)
    errors = signalled(process, tmp_path, signal.SIGUSR1)
    assert process.returncode == 128 + signal.SIGUSR1, errors
    assert "SIGUSR1 after another signal ended the run at once" in errors


def processes_of(group):
    """Names of the living processes of a process group, by their numbers."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, rest = file.read_text().split(" (", 1)
            name, rest = rest.rsplit(") ", 1)
            state, _, its_group = rest.split()[:3]
            if its_group == str(group) and state != "Z":
                found[int(number)] = name
    return found


def test_what_ends_a_deaf_torchrun_outlives_the_signals_of_its_group(fake, tmp_path):
    """Slurm tells every process of a step."""
    behaviour = f"trap 'touch {tmp_path}/ready' TERM INT USR1; touch {tmp_path}/started; until [[ -e {tmp_path}/go ]]"
    process = fake(f"{behaviour}; do sleep 0.05; done", "--no-preflight", start_new_session=True)

    def living():
        return processes_of(process.pid)

    wait_for((tmp_path / "started").exists, 30, process.poll)
    wait_for(lambda: "sleep" in living().values(), 30, living)
    both = {number for number, name in living().items() if name != "sleep"}
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        os.killpg(process.pid, number)
    wait_for((tmp_path / "ready").exists, 30, process.poll)
    assert both <= living().keys()
    assert len(both) == 2
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    wait_for(lambda: not living(), 10, living)


def test_a_script_that_is_changed_while_a_run_lasts_goes_on_in_its_old_text(fake, tmp_path):
    process = fake(f"touch {tmp_path}/ready; until [[ -e {tmp_path}/changed ]]; do sleep 0.05; done", "--no-preflight")
    wait_for((tmp_path / "ready").exists, 30, process.poll)
    with (tmp_path / "launch" / "pretrain.sh").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.write("# longer\n" * 3 + text)
    (tmp_path / "changed").touch()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_a_torchrun_that_outlives_its_ranks_and_hears_nothing_is_ended(fake, tmp_path):
    behaviour = f"trap '' TERM; sleep 600 & echo $! >{tmp_path}/rank\n"
    behaviour += 'echo 69 >"$SSR_EXIT_FILE"; while :; do sleep 0.2; done'
    process = fake(behaviour, "--no-preflight")
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 69
    assert "the ranks ended 90 s ago" in errors
    rank = int((tmp_path / "rank").read_text())
    wait_for(lambda: not Path(f"/proc/{rank}").exists(), 10, lambda: "its rank is alive")


SCRIPTS = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / "patches" / "apply.sh", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_shellcheck_finds_nothing(file):
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not found:
        pytest.skip("shellcheck is not installed; `make setup` brings it")
    result = subprocess.run(
        [found, "--enable=quote-safe-variables", file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_a_place_where_nobody_can_meet_is_told_before_anybody_waits(fake, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for node_rank, place, words in (
            ("0", f"127.0.0.1:{port}", f"port {port} of this machine, of --rendezvous or the next, cannot be used"),
            ("0", f"127.0.0.1:{port - 1}", f"port {port} of this machine"),
            ("1", "nowhere.invalid:29400", "the host of --rendezvous, nowhere.invalid, cannot be found from here"),
        ):
            several = ["--nodes", "2", "--node-rank", node_rank, "--rendezvous", place, "--id", "one"]
            process = fake("exit 0", "--no-preflight", *several)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 2
            assert words in errors
    assert calls(tmp_path) == []


def test_machines_that_have_not_met_are_told_what_to_compare(fake):
    several = [
        "--nodes",
        "2",
        "--node-rank",
        "1",
        "--rendezvous",
        "127.0.0.1:29400",
        "--id",
        "one",
        "--join-timeout",
        "1",
    ]
    # Without a process of its own, as torchrun is until all have come.
    process = fake("SECONDS=0; while ((SECONDS < 2)); do :; done; exit 1", "--no-preflight", *several)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the 2 machines have not met at 127.0.0.1:29400 in 1 s: are --id (here one), --nodes" in errors
