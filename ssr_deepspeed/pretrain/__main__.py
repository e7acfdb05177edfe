"""Pretrain a Mixture-of-Experts language model with Selective Sinkhorn Routing.

    torchrun --standalone --nproc-per-node 2 -m ssr_deepspeed.pretrain --config tiny_cpu --output runs/tiny

The run's folder gets config.json (everything resolved), metrics.jsonl (one JSON object a line),
checkpoints/, and at the end report.html with loss.png and load.png.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


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
    import deepspeed
    import torch.distributed
    from deepspeed.accelerator import get_accelerator

    from ssr_deepspeed.pretrain.config import load_run
    from ssr_deepspeed.pretrain.folder import Existing
    from ssr_deepspeed.pretrain.ranks import be_alone
    from ssr_deepspeed.pretrain.train import Run

    try:
        config = load_run(options.config, options.set)
    except ValueError as error:
        sys.exit(f"ssr-pretrain: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    if "RANK" not in os.environ:
        be_alone("ssr-pretrain")
    deepspeed.init_distributed()
    # Before the first collective: NCCL's ranks must not meet on one device.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    existing: Existing = "resume" if options.resume else "overwrite" if options.overwrite else "refuse"
    try:
        run = Run(config, options.output, existing, options.compare)
    except ValueError as error:
        # Every rank raises the same error; one of them says it.
        sys.exit(f"ssr-pretrain: {error}" if torch.distributed.get_rank() == 0 else 1)
    run.train()
    run.report()
    torch.distributed.barrier()  # the ranks leave together, when rank 0 has written the report
    torch.distributed.destroy_process_group()


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
    existing.add_argument("--resume", action="store_true", help="go on from the folder's latest checkpoint")
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
