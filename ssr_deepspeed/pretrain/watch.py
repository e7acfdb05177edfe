"""Who is missing when a run stands still.

A collective that waits for a stalled rank says at its timeout that it has waited, not for whom, and on an accelerator
the host may not hear of it at all. So a thread of each rank writes into the job's key-value store that it is alive, and
where its main thread is. Where that has not moved for a while, the thread reads what the others have written. A rank
whose thread has fallen silent is frozen, cut off or dead, and there is nothing to wait for; where all are alive, those
are named, at the timeout, that are behind.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from ssr_deepspeed.pretrain.signals import LOST, leave, say

# Seconds without a beat after which a thread is taken for silent, and without a move before it is asked. NCCL ends a
# process, without a word, a minute after the connection to another has broken.
_SILENCE = 25.0
# The same where this process is asked to end, perhaps because a rank of its machine has died: torchrun kills the
# others after 30 s.
_HURRY = 10.0
# Looks in a row at which the store is out of reach, and silences that they take, until nobody there is waited for.
_LOOKS = 3
_UNREACHABLE = "the launcher's store is out of reach: its host is down, or this one is cut off"


class _Beat(NamedTuple):
    """What a rank last wrote."""

    beats: int
    """Grows while its thread lives."""
    moves: int
    """Places its main thread has come through."""
    where: str
    host: str
    code: int
    """What it ends with by an error of its own; 0 while it runs."""


class Watch:
    """Ends this process, with one sentence that names the ranks to blame, when the run stands still.

    The exit code is LOST, or that of the rank whose own error was the cause.

    One thread talks to the store, and waits as long as that takes: over a dead link no timeout of the store's ends it.
    Another looks at the clock.

    Args:
        timeout: seconds without progress of this rank after which it gives up though all are alive.
        asked: the signal that this process was asked to stop by, 0 for none.
    """

    def __init__(self, timeout: float, asked: Callable[[], int] = lambda: 0) -> None:
        self.timeout, self._asked = timeout, asked
        self.interval = min(2.0, timeout / 8)
        self.rank, self._keys = dist.get_rank(), [str(rank) for rank in range(dist.get_world_size())]
        self._beats, self._moves, self._where, self._moved = 0, 0, "at the start", time.monotonic()
        self._code, self._alone = 0, False
        self._ended, self._wanted, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._answer: dict[int, _Beat] = {}
        self._looking = threading.Lock()
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own, where torch can: on the other the main thread may be waiting.
        self._store = dist.PrefixStore("ssr_watch", store.clone() if hasattr(store, "clone") else store)
        self._beat()
        for work in (self._talk, self._decide):
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True).start()

    def moved(self, where: str, alone: bool = False) -> None:
        """The main thread is here; every rank comes through the same places in the same order.

        Args:
            alone: busy with its own disk, which takes as long as it takes: that the launcher is gone ends nothing.
        """
        self._moves, self._where, self._moved, self._alone = self._moves + 1, where, time.monotonic(), alone

    def close(self) -> None:
        """The run is over; no rank waits for this one any more."""
        self._ended.set()
        self._wanted.set()

    def missing(self) -> tuple[str, int] | None:
        """A sentence on the ranks that have fallen silent, with the code to leave with; None where there are none.

        Takes some intervals.
        """
        if len(self._keys) == 1:
            return None
        before = self._look()
        time.sleep(2.5 * self.interval)
        now = self._look()
        if not now:
            return f"{self._where}: {_UNREACHABLE}", LOST
        silent = self._silent(before, now)
        if not silent:
            return None
        blame, code = _blamed(silent, now)
        return f"{self._where}: {blame}", code

    def failed(self, code: int) -> None:
        """Tell the others, who will miss this rank, that it ends by an error of its own."""
        self._code = code
        self._look()

    def _decide(self) -> None:
        before: dict[int, _Beat] | None = None
        looked, unheard = 0.0, 0
        while not self._ended.wait(self.interval):
            still = time.monotonic() - self._moved
            silence = max(2.5 * self.interval, min(_HURRY if self._asked() else _SILENCE, self.timeout / 4))
            if still < silence:
                before, unheard = None, 0
            elif before is None or time.monotonic() - looked > silence:
                now = self._look()
                silent = self._silent(before, now) if before and now else []
                unheard = 0 if now else unheard + 1
                if silent or still > self.timeout or (unheard >= _LOOKS and self._is_cut_off(still)):
                    self._give_up(still, silent, now)
                before, looked = now, time.monotonic()

    def _is_cut_off(self, still: float) -> bool:
        """Whether a store out of reach is reason enough: a launcher may end while its ranks still train or save."""
        patience = _LOOKS * min(_SILENCE, self.timeout / 4)
        return still > patience and not self._alone and len(self._keys) > 1

    def _talk(self) -> None:
        while not self._ended.is_set():
            wanted = self._wanted.wait(self.interval)
            self._beat()
            if wanted:
                self._wanted.clear()
                self._answer = self._read()
                self._answered.set()

    def _beat(self) -> None:
        self._beats += 1
        beat = _Beat(self._beats, self._moves, self._where, socket.gethostname(), self._code)
        # Where the store is out of reach, that is told when nothing else moves either.
        with contextlib.suppress(Exception):
            self._store.set(self._keys[self.rank], json.dumps(beat))

    def _look(self) -> dict[int, _Beat]:
        """What the ranks have last written; those left out have not. Empty where the store is out of reach."""
        with self._looking:
            self._answered.clear()
            self._wanted.set()
            return self._answer if self._answered.wait(2.5 * self.interval) else {}

    def _read(self) -> dict[int, _Beat]:
        with contextlib.suppress(Exception):
            # To get what nobody has written would wait for it.
            there = range(len(self._keys)) if self._store.check(self._keys) else self._written()
            values = self._store.multi_get([self._keys[rank] for rank in there])
            return {rank: _Beat(*json.loads(value)) for rank, value in zip(there, values, strict=True)}
        return {}

    def _written(self) -> list[int]:
        return [rank for rank, key in enumerate(self._keys) if self._store.check([key])]

    def _silent(self, before: dict[int, _Beat], now: dict[int, _Beat]) -> list[int]:
        others = (rank for rank in range(len(self._keys)) if rank != self.rank)
        return [rank for rank in others if rank not in now or now[rank] == before.get(rank)]

    def _give_up(self, still: float, silent: list[int], now: dict[int, _Beat]) -> NoReturn:
        here, code = f"no progress for {still:.0f} s {self._where}", LOST
        if silent:
            blame, code = _blamed(silent, now)
            say(f"{here}: {blame}")
        elif not now:
            say(f"{here}, and {_UNREACHABLE}")
        else:
            least = min(beat.moves for beat in now.values())
            behind = [rank for rank, beat in now.items() if beat.moves == least]
            if len(behind) < len(now):
                say(f"{here}: all ranks are alive, but behind the others are {_heard_of(behind, now)}")
            else:
                say(f"{here}: all ranks are alive and as far. This one is at")
            traceback.print_stack(sys._current_frames().get(threading.main_thread().ident or 0))
        leave(code)


@contextlib.contextmanager
def at_the_latest(seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Call `end`, in another thread, if what is inside takes longer: nothing can interrupt a collective."""
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _blamed(silent: list[int], beats: dict[int, _Beat]) -> tuple[str, int]:
    """What became of silent ranks, and the code to leave with; first of all those that have told their own end."""
    failed = [rank for rank in silent if rank in beats and beats[rank].code]
    if failed:
        return f"{_heard_of(failed, beats)}, ended by an error of its own; see what it has said", beats[failed[0]].code
    return f"{_heard_of(silent, beats)}, gone, frozen or cut off", LOST


def _heard_of(ranks: list[int], beats: dict[int, _Beat]) -> str:
    """`rank 1 (host b), last heard of in step 7`, for at most eight ranks."""
    words = [
        f"rank {rank} (host {beats[rank].host}), last heard of {beats[rank].where}"
        if rank in beats
        else f"rank {rank}, never heard of"
        for rank in ranks[:8]
    ]
    return "; ".join(words) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
