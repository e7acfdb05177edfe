"""launch/ranks.sh between a torchrun of our own and whoever started it: signals, exit statuses, places to meet."""

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.launch.runs import RUN, SCRIPT, arguments, environment, heed_signals, latest, losses, wait_for

RANKS = SCRIPT.with_name("ranks.sh")


@pytest.fixture
def fake(tmp_path):
    """Runs the script with a torchrun of our own: it notes its arguments and then does as `behaviour`, in bash."""
    (tmp_path / "launch").mkdir()
    for file in (SCRIPT, RANKS):  # away from a .venv beside the real one
        shutil.copy(file, tmp_path / "launch")
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
        # Killed while it still started, by the system for its memory; torchrun ends the others with SIGTERM.
        ('touch "$SSR_EXIT_FILE.started"; echo 75 >"$SSR_EXIT_FILE"; exit 1', 69),
        ('touch "$SSR_EXIT_FILE.started"; exit 1', 69),
        ('touch "$SSR_EXIT_FILE.begun"; echo 75 >"$SSR_EXIT_FILE"; exit 1', 75),
        ('echo 74 >"$SSR_EXIT_FILE"; exit 1', 74),
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
    behaviour = 'touch "$SSR_EXIT_FILE.begun"; echo 69 >"$SSR_EXIT_FILE"; exit 1'
    process = fake(behaviour, "--no-preflight", "--max-restarts", "2", "--overwrite")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 69
    started = "ssr_deepspeed.pretrain --overwrite " + " ".join(RUN)
    assert calls(tmp_path) == [started, f"{RAN} --resume", f"{RAN} --resume"]
    assert "exit status 69; restart 2 of 2" in errors


@pytest.mark.parametrize("words", [["--overwrite"], []])
def test_a_restart_before_training_has_begun_is_the_start_once_more(words, fake, tmp_path):
    """--resume would go on with the run that the folder held."""
    process = fake('echo 69 >"$SSR_EXIT_FILE"; exit 1', "--no-preflight", "--max-restarts", "1", *words)
    process.communicate(timeout=60)
    assert process.returncode == 69
    started = " ".join(["ssr_deepspeed.pretrain", *words, *RUN])
    assert calls(tmp_path) == [started, started]


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "weights"], ["--resume=weights"]])
def test_a_restart_resumes_as_the_first_start_did(resume, fake, tmp_path):
    """There may be no checkpoint of the new layout yet, and `weights` takes one of its own whole."""
    process = fake('touch "$SSR_EXIT_FILE.begun"; exit 1', "--no-preflight", "--max-restarts", "1", *resume)
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
    script = tmp_path / "launch" / RANKS.name
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


def several(place, node_rank="1", *options):
    return ["--nodes", "2", "--node-rank", node_rank, "--rendezvous", place, "--id", "one", "--no-preflight", *options]


def test_a_port_that_is_taken_is_told_before_anybody_waits(fake, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = fake("exit 0", *several(f"127.0.0.1:{port}", "0"))
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert f"port {port} of this machine, of --rendezvous or the next, cannot be used" in errors
        # The next one is for the preflight.
        process = fake("exit 0", *(word for word in several(f"127.0.0.1:{port - 1}", "0") if word != "--no-preflight"))
        assert f"port {port} of this machine" in process.communicate(timeout=60)[1]
    assert calls(tmp_path) == []


def test_a_host_that_has_no_name_yet_is_waited_for(fake, tmp_path):
    """As a pod is that does not run yet."""
    python = tmp_path / "bin" / "python3"
    asks = f'[[ -e {tmp_path}/named ]] || {{ touch {tmp_path}/named; exec {sys.executable} "$@"; }}'
    python.write_text(f"#!/usr/bin/env bash\n{asks}\n")
    python.chmod(0o755)
    process = fake("exit 0", *several("nowhere.invalid:29400"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "nowhere.invalid, cannot be found from here (" in errors
    assert "; trying for 600 s" in errors
    assert calls(tmp_path) == [RAN]


def test_a_host_that_nobody_knows_is_an_error_after_the_time_given(fake, tmp_path):
    process = fake("exit 0", *several("nowhere.invalid:29400", "1", "--join-timeout", "1"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].endswith("), in 1 s")
    assert calls(tmp_path) == []


def test_a_signal_ends_the_search_for_a_host(fake, tmp_path):
    process = fake("sleep 60", *several("nowhere.invalid:29400"))
    assert any("trying for" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors


@pytest.mark.parametrize("end", ["exit 1", "kill -KILL $$"], ids=["by itself", "where something else listens there"])
def test_machines_that_have_not_met_are_told_what_to_compare(end, fake):
    process = fake(end, *several("127.0.0.1:29400", "1", "--max-restarts", "3"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("before all 2 machines had met at 127.0.0.1:29400") == 1
    assert "are --id (here one), --nodes, --rendezvous" in errors


def test_a_restart_waits_for_machines_that_end_the_attempt_before(fake, tmp_path):
    """Its number counts for all of them: one ahead of the others would never meet them."""
    behaviour = f"""
n=$(wc -l <{tmp_path}/calls)
((n < 4)) || exit 0
((n == 1)) || exit 1
sleep 600 & touch "$SSR_EXIT_FILE.begun"; until [[ -e $SSR_EXIT_FILE.met ]]; do :; done
kill $!; echo 69 >"$SSR_EXIT_FILE"; exit 1"""
    process = fake(behaviour, *several("127.0.0.1:29400", "1", "--max-restarts", "1"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.count("restart 1 of 1") == 1
    ids = [line.split("--rdzv-id ")[1].split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert ids == ["one-0", "one-1", "one-1", "one-1"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_console_that_is_gone_changes_no_status(stream, fake, tmp_path):
    process = fake(
        f'touch {tmp_path}/ready; until [[ -e {tmp_path}/gone ]]; do :; done; echo 69 >"$SSR_EXIT_FILE"; exit 1',
        "--no-preflight",
        "--max-restarts",
        "1",
    )
    wait_for((tmp_path / "ready").exists, 30, process.poll)
    getattr(process, stream).close()
    (tmp_path / "gone").touch()
    assert process.wait(timeout=60) == 69
    assert calls(tmp_path) == [RAN, RAN]


@pytest.mark.slow
def test_a_terminal_that_hangs_up_leaves_a_checkpoint(cache, tmp_path):
    """As that of a connection does which is lost; nothing reads any more what the ranks say."""
    run, (ours, theirs) = tmp_path / "run", pty.openpty()

    def take_terminal():
        heed_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [SCRIPT, "--ranks-per-node", "2", "--no-preflight", *arguments(cache, run, 100_000)],
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    deadline = time.monotonic() + 200
    while latest(run) < 20:
        assert time.monotonic() < deadline
        os.read(ours, 2**16)
    os.close(ours)
    assert process.wait(timeout=120) == 75
    assert latest(run) == max(losses(run))
