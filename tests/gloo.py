"""Run a function on n real gloo ranks."""

import datetime
import multiprocessing
import os
import traceback
from concurrent.futures import ProcessPoolExecutor

_context = multiprocessing.get_context("forkserver")
# The server imports the heavy packages once; every rank is forked from it.
_context.set_forkserver_preload(["torch", "deepspeed", "datasets"])


def run_ranks(ranks, function, *arguments, folder, timeout=300):
    """Call `function(*arguments)` on every rank of a gloo group; the results in rank order.

    Args:
        folder: an empty temporary folder for the rendezvous file.
    """
    rendezvous = folder / f"rendezvous_{os.urandom(4).hex()}"
    with ProcessPoolExecutor(ranks, mp_context=_context) as pool:
        calls = [pool.submit(_call, rank, ranks, str(rendezvous), function, arguments) for rank in range(ranks)]
        return [call.result(timeout=timeout) for call in calls]


def _call(rank, ranks, rendezvous, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    import deepspeed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    deepspeed.init_distributed("gloo")
    try:
        return function(*arguments)
    except BaseException:
        # As text: not every exception, pytest's own among them, survives the way between processes.
        raise AssertionError(f"on rank {rank} of {ranks}:\n{traceback.format_exc()}") from None
    finally:
        dist.destroy_process_group()
