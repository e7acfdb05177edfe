"""Stopping on a signal: every rank saves the same step, and the exit code says what the launcher should do.

SIGTERM and SIGUSR1 mean that the machine is wanted for something else: the run saves and exits with REQUEUE. SIGINT is
a person, who need not be started again. Any one rank that gets a signal is enough. The same signal within five seconds
is the same one: Slurm and terminals signal every process, and torchrun hands on to its workers what it gets. Later than
that, it ends the process at once.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ssr_deepspeed.collectives import host_group
from ssr_deepspeed.files import replace_text

LOST = 69
"""A rank stalled or was lost (EX_UNAVAILABLE): start again with --resume."""
NOT_SAVED = 74
"""The last checkpoint could not be written (EX_IOERR): make room, then --resume."""
REQUEUE = 75
"""Stopped by SIGTERM or SIGUSR1, and saved (EX_TEMPFAIL): start again with --resume."""
INTERRUPTED = 128 + signal.SIGINT
"""Stopped by SIGINT, and saved."""

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME = 5.0


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop, and has saved
    """The run was asked to stop, and every rank has saved the same step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; go on with --resume")


def exit_code(number: int) -> int:
    """Of a run that was stopped by a signal, and has lost nothing."""
    return INTERRUPTED if number == signal.SIGINT else REQUEUE


class Signals:
    """The signals that have come to this process, taken in also while it waits in a collective.

    Must be made in the main thread. Until `arm` is called there is nothing to save, and the first ends the process. A
    launcher that is gone counts as SIGTERM: nobody else would end its orphans.

    Args:
        launched: a launcher started this process and stays as long as it runs.
    """

    def __init__(self, launched: bool) -> None:
        self._asked, self._armed, self._when = 0, False, dict.fromkeys(STOPPING, 0.0)
        self._parent = os.getppid() if launched else None
        self._ears, mouth = socket.socketpair()
        self._mouth = mouth
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            # Python calls its handlers between two instructions of the main thread, and a collective is one. What
            # writes to the wakeup descriptor is in C.
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        _tell(".started", "")  # whoever dies from here on without a word has been lost

    def asked(self) -> int:
        """The signal to stop by, 0 for none."""
        return self._asked

    def arm(self) -> None:
        """From here on the run stops by itself where a signal asks it to."""
        self._armed = True
        _tell(".begun", "")

    def ignore(self) -> None:
        """From here on signals change nothing: the process is about to end by itself."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        self._ears.settimeout(1.0)
        while True:
            try:
                for number in self._ears.recv(64):
                    if number in STOPPING:  # not SIGCHLD, which loader processes raise
                        self._take(signal.Signals(number))
            except TimeoutError:
                if self._parent is not None and os.getppid() != self._parent:
                    say("the launcher is gone")
                    self._parent = None
                    self._take(signal.SIGTERM)

    def _take(self, number: signal.Signals) -> None:
        before, self._when[number] = self._when[number], time.monotonic()
        if before and self._when[number] - before > _SAME:
            say(f"{number.name} again: ending at once")
            leave(128 + number)
        if not self._armed:
            say(f"{number.name} before training has begun: ending, there is nothing to save")
            leave(exit_code(number), follows=True)
        self._asked = self._asked or number
        if not before:
            say(f"{number.name}: saving at the end of the step")


def outlive_signals(worker: int) -> None:
    """In a loader's process: torchrun signals whole process groups, and the step that is saved still needs its data."""
    signal.set_wakeup_fd(-1)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class Agreement:
    """Whether all ranks stop at the end of a step, decided by one small all-reduce that runs beside the step.

    It is begun before the step and read after it: nothing waits for it but the host of a rank that is ahead of
    others by a step. A signal is obeyed at the end of the step after the one in which it came, at the latest.

    Args:
        asked: the signal that this rank was asked to stop by, 0 for none.
        timeout: of the collective.
    """

    def __init__(self, asked: Callable[[], int], timeout: timedelta) -> None:
        self._asked = asked
        self._flag = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._group, self._work = None, None
        if dist.get_world_size() > 1:
            # Of its own also beside gloo's: the default group's collectives would be out of order.
            self._group = host_group(timeout=timeout)

    def ask(self) -> None:
        """Begin; every rank calls it, and `agreed` afterwards."""
        self._flag.fill_(self._asked())
        if self._group is not None:
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> int:
        """The signal to stop by, the same on every rank; 0: go on."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._flag)

    def at_once(self) -> int:
        """Ask and wait: after what takes longer than a step."""
        self.ask()
        return self.agreed()


def leave(code: int, follows: bool = False) -> NoReturn:
    """End this process now, other threads and collectives or not, and tell the launcher as `tell_launcher` does."""
    tell_launcher(code, follows)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell_launcher(code: int, follows: bool = False) -> None:
    """Write the exit code to the file that SSR_EXIT_FILE names: torchrun's own is 1 for all of its workers'.

    Args:
        follows: this process may end because of another, whose code stays, as it does where one is missed (LOST).
    """
    path = os.environ.get("SSR_EXIT_FILE")
    if path and (follows or code == LOST) and Path(path).is_file() and Path(path).stat().st_size:
        return
    _tell("", f"{code}\n")


def _tell(suffix: str, content: str) -> None:
    path = os.environ.get("SSR_EXIT_FILE")
    if path:
        try:
            replace_text(Path(path + suffix), content)
        except OSError as error:
            say(f"cannot write SSR_EXIT_FILE = {path}: {error}")


class _Console(io.FileIO):
    """Standard output or error, also when nobody reads it any more."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return memoryview(content).nbytes


def outlive_console() -> None:
    """From here on nothing that is printed can fail: a terminal or a pipe may go before the run does."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        old.flush()
        raw: Any = _Console(old.fileno(), "w", closefd=False)
        # `python -u`, as torchrun starts it, has no buffer.
        raw = raw if old.write_through else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(raw, old.encoding, old.errors, None, old.line_buffering, old.write_through))


def say_once(sentence: str) -> None:
    """One line for what all ranks know alike."""
    if dist.get_rank() == 0:
        say(sentence)


def say(sentence: str) -> None:
    """One line on stderr, with the rank. In one write: lines of several ranks stay whole."""
    sys.stderr.write(f"ssr-pretrain, rank {os.environ.get('RANK', 0)}: {sentence}\n")
    sys.stderr.flush()
