import os
import signal
import subprocess
import sys
import time

import pytest

from ssr_deepspeed.pretrain import signals
from tests.gloo import _context


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _get(numbers, armed, same, exit_file, survives):
    """Get these signals, 0.2 s apart; end with 7 where the process is to survive them, and else wait for the end."""
    os.environ["SSR_EXIT_FILE"] = exit_file
    signals._SAME = same
    taken = signals.Signals(launched=False)
    if armed:
        taken.arm()
    for number in numbers:
        before = taken._when[number]
        until(lambda before=before: time.monotonic() - before > 0.2)
        os.kill(os.getpid(), number)
        until(lambda number=number, before=before: taken._when[number] > before and taken.asked())
    until(lambda: survives)
    assert taken.asked() == numbers[0]
    os._exit(7)


def test_the_code_of_a_rank_that_failed_outlasts_those_of_its_neighbours(tmp_path):
    """torchrun ends them with SIGTERM, before they have trained; a later error of a rank's own counts again."""
    file = tmp_path / "code"
    file.write_text("69\n")
    process = _context.Process(target=_get, args=([signal.SIGTERM], False, 60, str(file), False))
    process.start()
    process.join(120)
    assert (process.exitcode, file.read_text()) == (75, "69\n")
    assert (tmp_path / "code.started").exists()
    assert not (tmp_path / "code.begun").exists()


SPEAKS = """
import sys
from ssr_deepspeed.pretrain.signals import outlive_console, say
outlive_console()
print("ready", file=sys.stderr, flush=True)
sys.stdin.readline()
for _ in range(2):
    print("step 1", flush=True)
    say("saved")
try:
    raise MemoryError
except MemoryError:
    __import__("traceback").print_exc()
sys.exit(75)
"""


def test_what_is_printed_is_seen_at_once_where_nothing_is_to_be_held_back():
    """As torchrun asks for: a process that is killed would take it along."""
    text = "import os, sys; from ssr_deepspeed.pretrain.signals import outlive_console; outlive_console()"
    text += "; print('x'); sys.stderr.write('y'); os._exit(0)"
    result = subprocess.run([sys.executable, "-u", "-c", text], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr[-1:]) == ("x\n", "y")


def test_a_console_that_is_gone_ends_nothing():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", SPEAKS], text=True, **pipes)
    assert any("ready" in line for line in iter(process.stderr.readline, ""))
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 75


@pytest.mark.parametrize(
    ("numbers", "armed", "same", "code", "told"),
    [
        pytest.param([signal.SIGUSR1, signal.SIGTERM], True, 0.1, 7, None, id="a notice, then the limit"),
        pytest.param([signal.SIGTERM, signal.SIGTERM], True, 60, 7, None, id="to each process, and by torchrun"),
        pytest.param([signal.SIGTERM, signal.SIGTERM], True, 0.1, 128 + signal.SIGTERM, "143", id="again later"),
        pytest.param([signal.SIGTERM], False, 0.1, 75, "75", id="before training"),
        pytest.param([signal.SIGINT], False, 0.1, 130, "130", id="Ctrl-C before training"),
    ],
)
def test_a_signal_ends_at_once_only_when_it_comes_again_or_before_training(tmp_path, numbers, armed, same, code, told):
    file = tmp_path / "code"
    process = _context.Process(target=_get, args=(numbers, armed, same, str(file), code == 7))
    process.start()
    process.join(120)
    assert process.exitcode == code
    assert (file.read_text().strip() if file.exists() else None) == told
