"""Pretrain a Mixture-of-Experts language model with Selective Sinkhorn Routing.

    torchrun --standalone --nproc-per-node 2 -m ssr_deepspeed.pretrain --config tiny_cpu --output runs/tiny

The run's folder gets config.json (everything resolved), metrics.jsonl (one JSON object a line),
checkpoints/, and at the end report.html with loss.png and load.png.

SIGTERM and SIGUSR1 save the step and exit with 75, SIGINT with 130; 74: the checkpoint could not be written;
69: a rank stalled or was lost. torchrun exits with 1 for all of them: the code stands in the file that the
environment variable SSR_EXIT_FILE names.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssr_deepspeed.pretrain.folder import Existing


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `ssr-pretrain`."""
    parser = argparse.ArgumentParser(
        "ssr-pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    # DeepSpeed compiles its operators with the ninja on the PATH; pip puts one beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # torch and DeepSpeed take seconds to import; --help and a misspelt flag should not.
    from ssr_deepspeed.pretrain.config import load_run
    from ssr_deepspeed.pretrain.ranks import be_alone
    from ssr_deepspeed.pretrain.signals import outlive_console
    from ssr_deepspeed.pretrain.supervise import supervise

    outlive_console()

    try:
        config = load_run(options.config, options.set)
    except ValueError as error:
        # Once on each machine: its files may be others.
        sys.exit(f"ssr-pretrain: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    launched = "RANK" in os.environ
    if not launched:
        be_alone("ssr-pretrain")
    sys.exit(supervise(config, options.output, existing_of(options), options.compare, launched))


def existing_of(options: argparse.Namespace) -> Existing:
    """What to do with a run that the folder holds."""
    if options.resume:
        return "weights" if options.resume == "weights" else "resume"
    return "overwrite" if options.overwrite else "refuse"


def add_arguments(parser: argparse.ArgumentParser, output_required: bool = True) -> None:
    """What a run's command line holds; `ssr-preflight` takes the same line."""
    parser.add_argument(
        "--config", required=True, help="run file (JSON), or the name of one that comes with the package"
    )
    parser.add_argument("--output", type=Path, required=output_required, help="the run's folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, as in deepspeed.ssr.probability=0.01",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        nargs="?",
        const="exact",
        choices=("exact", "weights"),
        help="go on from the folder's newest whole checkpoint; weights: also where it was written by another number "
        "of ranks or with another ep_size, and the optimizer's moments begin anew",
    )
    existing.add_argument("--overwrite", action="store_true", help="remove the run that the folder holds")
    parser.add_argument(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a finished run to show beside this one",
    )
    # torchrun and deepspeed's launcher may add it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


if __name__ == "__main__":
    main()
