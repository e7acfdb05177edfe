"""Who is missing when a run stands still.

A collective that waits for a stalled rank says at its timeout that it has waited, not for whom, and on an accelerator
the host may not hear of it at all. So a thread of each rank writes into the job's key-value store that it is alive, and
where its main thread is. Where that has not moved for too long, the thread reads what the others have written: a rank
whose thread has fallen silent is frozen, cut off or dead; where all are alive, those are named that are behind.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from ssr_deepspeed.pretrain.signals import LOST, leave, say

# Of the timeout: when a rank that has not moved begins to look at the others.
_SUSPICION = 0.6
_UNREACHABLE = "the launcher's store is out of reach: its host is down, or this one is cut off"


class _Beat(NamedTuple):
    """What a rank last wrote."""

    beats: int
    """Grows while its thread lives."""
    moves: int
    """Places its main thread has come through."""
    where: str
    host: str


class Watch:
    """Ends this process with LOST, and one sentence that names the ranks to blame, when the run stands still.

    One thread talks to the store, and waits as long as that takes: over a dead link no timeout of the store's ends it.
    Another looks at the clock.

    Args:
        timeout: seconds without progress of this rank after which it gives up.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(2.0, timeout / 8)
        self.rank, self._keys = dist.get_rank(), [str(rank) for rank in range(dist.get_world_size())]
        self._beats, self._moves, self._where, self._moved = 0, 0, "at the start", time.monotonic()
        self._ended, self._wanted, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._answer: dict[int, _Beat] = {}
        self._looking = threading.Lock()
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own, where torch can: on the other the main thread may be waiting.
        self._store = dist.PrefixStore("ssr_watch", store.clone() if hasattr(store, "clone") else store)
        self._beat()
        for work in (self._talk, self._decide):
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True).start()

    def moved(self, where: str) -> None:
        """The main thread is here; every rank comes through the same places in the same order."""
        self._moves, self._where, self._moved = self._moves + 1, where, time.monotonic()

    def close(self) -> None:
        """The run is over; no rank waits for this one any more."""
        self._ended.set()
        self._wanted.set()

    def missing(self) -> str | None:
        """A sentence on the ranks that have fallen silent, None where there are none. Takes some intervals."""
        if len(self._keys) == 1:
            return None
        before = self._look()
        time.sleep(2.5 * self.interval)
        now = self._look()
        if not now:
            return f"{self._where}: {_UNREACHABLE}"
        silent = _heard_of(self._silent(before, now), now)
        return f"{self._where}: {silent}, gone or frozen" if silent else None

    def _decide(self) -> None:
        before: dict[int, _Beat] | None = None
        looked = 0.0
        while not self._ended.wait(self.interval):
            still = time.monotonic() - self._moved
            if still < _SUSPICION * self.timeout:
                before = None
            elif before is None:
                before, looked = self._look(), time.monotonic()
            elif still > self.timeout and time.monotonic() - looked > 2.5 * self.interval:
                self._give_up(before)

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
        beat = _Beat(self._beats, self._moves, self._where, socket.gethostname())
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

    def _give_up(self, before: dict[int, _Beat]) -> NoReturn:
        now = self._look()
        here = f"no progress for {self.timeout:g} s {self._where}"
        silent = _heard_of(self._silent(before, now), now)
        if not now:
            say(f"{here}, and {_UNREACHABLE}")
        elif silent:
            say(f"{here}: {silent}, gone, frozen or cut off")
        else:
            least = min(beat.moves for beat in now.values())
            behind = [rank for rank, beat in now.items() if beat.moves == least]
            if len(behind) < len(now):
                say(f"{here}: all ranks are alive, but behind the others are {_heard_of(behind, now)}")
            else:
                say(f"{here}: all ranks are alive and as far. This one is at")
            traceback.print_stack(sys._current_frames().get(threading.main_thread().ident or 0))
        leave(LOST)


def _heard_of(ranks: list[int], beats: dict[int, _Beat]) -> str | None:
    """`rank 1 (host b), last heard of in step 7`, for at most eight ranks; None for none."""
    words = [
        f"rank {rank} (host {beats[rank].host}), last heard of {beats[rank].where}"
        if rank in beats
        else f"rank {rank}, never heard of"
        for rank in ranks[:8]
    ]
    return "; ".join(words) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "") or None
