"""Check on all ranks what a pretraining run needs, before it starts.

    torchrun --standalone --nproc-per-node 2 -m ssr_deepspeed.preflight --config tiny_cpu --output runs/tiny

Takes the command line of ssr-pretrain under the same launcher, in some seconds. Prints one line a check and which
rank holds which experts; ends with 1 on every rank when a check failed, else with 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

from ssr_deepspeed.pretrain.__main__ import add_arguments, existing_of
from ssr_deepspeed.pretrain.ranks import be_alone

_COMMAND = "ssr-preflight"
_COLLECTIVE = timedelta(seconds=30)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `ssr-preflight`."""
    begun = time.monotonic()
    options = _parser().parse_args(arguments)
    if "RANK" not in os.environ:
        be_alone(_COMMAND)
    # torch and DeepSpeed take seconds to import; --help and a misspelt flag should not.
    from deepspeed.accelerator import get_accelerator

    from ssr_deepspeed.preflight.checks import Request, run_checks
    from ssr_deepspeed.preflight.findings import summary, table
    from ssr_deepspeed.preflight.job import local_rank, meet

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    request = Request(
        config=options.config,
        overrides=options.set,
        output=options.output,
        existing=existing_of(options),
        expect_ranks=options.expect_ranks,
        hostfile=options.hostfile,
        quick=options.quick,
    )
    failed = True
    try:
        if local_rank() < get_accelerator().device_count():
            get_accelerator().set_device(local_rank())
        job = meet(_COLLECTIVE)
        findings, experts = run_checks(job, request)
        failed = any(finding.failed for finding in findings)
        if job.rank == 0:
            seconds = time.monotonic() - begun
            print(f"{_COMMAND}: {job.name(range(job.ranks))}\n{table(findings)}\n{experts}".rstrip())
            print(f"{_COMMAND}: {summary(findings)}, in {seconds:.1f} s", flush=True)
        elif failed and job.rank in job.leaders:
            # Its console may be the only one that somebody looks at.
            print(table([finding for finding in findings if finding.failed]), flush=True)
        job.gather(None)  # the ranks leave together
    except Exception as error:
        failed = True
        _say(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's own way: a collective that never ends would hold its thread, and so this process.
    os._exit(1 if failed else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        _COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = parser.add_argument_group("checks")
    own.add_argument("--expect-ranks", type=int, metavar="N", help="ranks that must join, whatever a scheduler says")
    own.add_argument("--hostfile", type=Path, help="DeepSpeed's hostfile: it must be there, and all its slots taken")
    own.add_argument("--quick", action="store_true", help="no bandwidths")
    # Also what only ssr-pretrain acts on, so that one command line serves both.
    add_arguments(parser, output_required=False)
    return parser


def _say(error: Exception) -> None:
    """One sentence for a job whose ranks cannot find or hear each other, a traceback for anything else."""
    from ssr_deepspeed.preflight.job import ADVICE

    where = f"{_COMMAND}: rank {os.environ.get('RANK')} ({socket.gethostname()})"
    if isinstance(error, RuntimeError):
        print(f"{where}: {str(error).splitlines()[0]}; {ADVICE}", file=sys.stderr)
    else:
        print(f"{where}: {traceback.format_exc()}", file=sys.stderr)


if __name__ == "__main__":
    main()
