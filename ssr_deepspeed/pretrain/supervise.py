"""A run as a process among others: process group, signals, watch, and the exit code that all ranks agree on."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from ssr_deepspeed.pretrain.checkpoint import NotSavedError
from ssr_deepspeed.pretrain.config import RunConfig
from ssr_deepspeed.pretrain.folder import Existing
from ssr_deepspeed.pretrain.signals import (
    LOST,
    NOT_SAVED,
    Signals,
    Stopped,
    exit_code,
    leave,
    say,
    say_once,
    tell_launcher,
)
from ssr_deepspeed.pretrain.train import Run
from ssr_deepspeed.pretrain.watch import Watch, at_the_latest

_MEETING = 600.0
"""Seconds that ranks may take to meet, at least; DeepSpeed compiles an operator on the way where it has none yet."""
_CLOSING = 60.0
"""Seconds that closing the connections at the end may take."""


def supervise(
    config: RunConfig, folder: Path, existing: Existing, compare: Sequence[Path], launched: bool
) -> str | int | None:
    """Train a run on all ranks that the environment names, to its end or to a signal.

    Args:
        launched: a launcher started this process and stays as long as it runs.

    Returns:
        What `sys.exit` is to be called with.
    """
    signals = Signals(launched)
    try:
        watch = _join(config, signals)
    except Exception as error:
        traceback.print_exc()
        # With the launcher that keeps the meeting place goes the connection to it.
        leave(LOST if isinstance(error, dist.DistNetworkError | dist.DistStoreError) else 1)
    try:
        try:
            run = Run(config, folder, existing, compare, asked=signals.asked, moved=watch.moved)
        except ValueError as error:
            # Every rank raises the same error; one of each machine says it.
            tell_launcher(1)
            return f"ssr-pretrain: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1
        dist.barrier()  # no machine restarts as if the run were there, and another as if it were not
        signals.arm()
        code = _train(run, watch)
        signals.ignore()  # of several ranks that end, torchrun ends the last with SIGTERM
        watch.moved("at the end")
        dist.barrier()  # the ranks leave together: all have saved, and rank 0 has written the report
    except Exception:
        traceback.print_exc()
        _leave_after_error(watch)
    if code:
        tell_launcher(code)
    watch.close()
    # NCCL closes its connections together with the others, one of whom may fail just now. All is saved.
    with at_the_latest(_CLOSING, lambda: leave(code)):
        dist.destroy_process_group()
    sys.stdout.flush()
    return code


def _join(config: RunConfig, signals: Signals) -> Watch:
    """Meet the other ranks; from then on somebody watches."""
    # DeepSpeed gives its own groups no timeout, and at torch's, 10 minutes under NCCL, a process ends without a word.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = config.collective_timeout
    # Before the first collective: NCCL's ranks must not meet on one device.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))

    patience = max(config.timeout, _MEETING)

    def give_up() -> None:
        # A process that was killed while it compiled leaves its lock, for which all others wait.
        folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
        locks = [str(lock) for lock in Path(folder).glob("**/lock")]
        held = f"if nothing compiles any more, remove {' and '.join(locks)}; " if locks else ""
        say(f"the ranks have not met in {patience:g} s: {held}ssr-preflight tells what else to look at")
        leave(LOST)

    # No timeout of NCCL's own ends its first meeting.
    with at_the_latest(patience, give_up):
        deepspeed.init_distributed(timeout=config.collective_timeout)
        return Watch(config.timeout, signals.asked)


def _leave_after_error(watch: Watch) -> NoReturn:
    """End this process by the error of another rank that is missing, or by its own."""
    missing = watch.missing()
    if missing is None:
        watch.failed(1)
        leave(1)  # not by `raise`: at the interpreter's end loader processes, which outlive signals, are waited for
    sentence, code = missing
    say(sentence + (". Start again with --resume" if code == LOST else ""))
    leave(code)


def _train(run: Run, watch: Watch) -> int:
    """The exit code, the same on every rank."""
    try:
        run.train()
        watch.moved("writing the report")
        run.report()
    except Stopped as stopped:
        if run.rank == 0:
            print(f"ssr-pretrain: {stopped}", flush=True)
        return exit_code(stopped.number)
    except NotSavedError as error:
        say_once(str(error))
        return NOT_SAVED
    return 0
