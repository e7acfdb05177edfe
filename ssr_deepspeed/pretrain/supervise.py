"""A run as a process among others: process group, signals, watch, and the exit code that all ranks agree on."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

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
from ssr_deepspeed.pretrain.watch import Watch


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
    deepspeed.init_distributed(timeout=config.collective_timeout)
    # Before the first collective: NCCL's ranks must not meet on one device.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    watch = Watch(config.timeout)
    try:
        try:
            run = Run(config, folder, existing, compare, asked=signals.asked, moved=watch.moved)
        except ValueError as error:
            # Every rank raises the same error; one of them says it.
            return f"ssr-pretrain: {error}" if dist.get_rank() == 0 else 1
        signals.arm()
        code = _train(run, watch)
        signals.ignore()  # of several ranks that end, torchrun ends the last with SIGTERM
        watch.moved("at the end")
        dist.barrier()  # the ranks leave together: all have saved, and rank 0 has written the report
    except Exception:
        traceback.print_exc()
        missing = watch.missing()
        if missing is None:
            leave(1)  # not by `raise`: at the interpreter's end loader processes, which outlive signals, are waited for
        say(f"{missing}. Start again with --resume")
        leave(LOST)
    watch.close()
    dist.destroy_process_group()
    if code:
        tell_launcher(code)
    sys.stdout.flush()
    return code


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
