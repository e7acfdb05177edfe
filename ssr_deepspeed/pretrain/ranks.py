"""How many ranks a job has, and how many it should have."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping

from ssr_deepspeed.pretrain.config import ModelConfig

_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Of the running step where there is one, else of the whole allocation.
_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")


def expected_ranks(environment: Mapping[str, str]) -> dict[str, int]:
    """Ranks that a process's environment speaks of, by the names of its variables.

    A scheduler's tasks are the ranks, or the launchers that start several each: fewer ranks than tasks are too few.
    """
    counts = {name: _count(environment, name) for name in ("WORLD_SIZE", *_TASKS)}
    local = _count(environment, "LOCAL_WORLD_SIZE")
    for name in ("NNODES", "PET_NNODES"):
        counts[f"{name} * LOCAL_WORLD_SIZE"] = _count(environment, name) * local
    return {name: count for name, count in counts.items() if count}


def expected_hosts(environment: Mapping[str, str]) -> tuple[str, int]:
    """The variable that says how many hosts Slurm gave to this job, and what it says; ("", 0) elsewhere."""
    for name in _SLURM_NODES:
        if count := _count(environment, name):
            return name, count
    return "", 0


def be_alone(command: str) -> None:
    """Started without a launcher: a process group of one.

    Raises:
        SystemExit: a scheduler started several tasks, each of which would be such a group.
    """
    for name in _TASKS:
        if _count(os.environ, name) > 1:
            sys.exit(
                f"{command}: {name} = {os.environ[name]}, but no RANK is set: each task would train by itself. "
                "Start torchrun in every task, or in one task a node"
            )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def check_layout(model: ModelConfig, ranks: int) -> None:
    """Raise the ValueError of a number of ranks that the experts cannot be laid out on."""
    if ranks % model.ep_size:
        raise ValueError(
            f"model.ep_size = {model.ep_size} does not divide the {ranks} ranks of this run: "
            f"launch a multiple of {model.ep_size} processes or set model.ep_size"
        )


def _count(environment: Mapping[str, str], name: str) -> int:
    """A number in the environment, the least of a range such as torchrun's 2:4; 0 where there is none."""
    text = environment.get(name, "").partition(":")[0]
    return int(text) if text.isdigit() else 0
