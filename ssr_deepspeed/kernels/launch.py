"""Where the kernels apply, and how they divide tokens among programs.

A program takes tiles of whole expert rows, one after the other, so that a row's maximum, total and
choices need no other program.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

TRITON = importlib.util.find_spec("triton") is not None
"""Looked up once: a traced function could not ask."""
_answers: bool | None = None
"""Whether Triton's driver came up, once it has been asked."""

MAX_EXPERTS = 1024
"""A row of them is one tile of registers."""
MAX_CHOICES = 16
"""Each choice is one pass over the row in registers."""

# 16 elements a thread at Triton's default of 4 warps of 32: a tile and what is made of it stay in registers.
TILE = 2048
# Eight for each of the 132 multiprocessors of an H100 or H200, about what their registers hold at once. Not timed.
PROGRAMS = 1024
# Entries of all partial sums together. They are written and read once: it keeps them small beside many wide rows.
PARTIALS = 2**18


def usable(tensor: Tensor, experts: int, k: int = 1) -> bool:
    """Whether the kernels can take these scores, by facts that the host knows: nothing is read from the device.

    Args:
        tensor: the scores, any shape.
        experts: E.
        k: experts a token; 1 where none are chosen.
    """
    return (
        tensor.device.type == "cuda"  # ROCm too
        and tensor.dtype == torch.float32
        and 1 <= k <= MAX_CHOICES
        and k <= experts <= MAX_EXPERTS
        and launchable()
    )


def launchable() -> bool:
    """Whether Triton is there and, as far as is known, reaches the device.

    It is asked once a process, but not while torch traces: routers ask when they are set up on a device. At
    its first use it builds its driver by a C compiler, which images made for running often lack: the first
    pass would end the run, though torch alone computes the same.
    """
    # Where there is no device its tensors are fake, and nothing will be launched.
    if TRITON and _answers is None and not torch.compiler.is_compiling() and torch.cuda.is_available():
        _ask_driver()
    return TRITON and _answers is not False


def _ask_driver() -> None:
    """Have Triton build its driver; a sentence on stderr if that fails."""
    global _answers
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
        _answers = True
    except Exception as error:
        _answers = False
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(
            f"SSR cannot use its Triton kernels ({reason}) and goes on with torch alone, which is slower: install "
            "a C compiler (gcc) and Python's headers (python3-dev), and start again",
            file=sys.stderr,
            flush=True,
        )


@dataclass(frozen=True)
class Tiling:
    """How many programs run, and the tile that each takes at a time."""

    rows: int
    """Tokens of a tile, a power of two."""
    columns: int
    """Experts, padded to a power of two."""
    programs: int


def tiling(tokens: int, experts: int) -> Tiling:
    """Divide `[T, E]` scores."""
    # Two columns at least: reductions over an axis of one element are a corner nobody tests.
    columns = max(2, power_of_two(experts))
    rows = min(TILE // columns, 128)
    return Tiling(rows, columns, min(-(-tokens // rows), PROGRAMS, PARTIALS // columns))


def power_of_two(number: int) -> int:
    """The least power of two that is no less than `number`."""
    return 1 << (number - 1).bit_length()


def check_scores(name: str, scores: Tensor) -> None:
    """Refuse scores that no kernel takes.

    Raises:
        ValueError: not `[T, E]`, not fp32, or too many experts.
    """
    if scores.dim() != 2:
        raise ValueError(f"{name} must be [tokens, experts], got shape {tuple(scores.shape)}")
    if scores.dtype != torch.float32:
        raise ValueError(f"{name} are {scores.dtype}; allowed: torch.float32")
    if not 1 <= scores.shape[1] <= MAX_EXPERTS:
        raise ValueError(f"{name} have {scores.shape[1]} experts; allowed: 1 to {MAX_EXPERTS}")


def check_vector(name: str, vector: Tensor, dtype: torch.dtype, length: int) -> None:
    """Refuse a vector of another dtype or length.

    Raises:
        ValueError: it is not `[length]` of that dtype.
    """
    if vector.dtype != dtype or vector.dim() != 1 or vector.shape[0] != length:
        raise ValueError(f"{name} must be {dtype} [{length}], got {vector.dtype} {list(vector.shape)}")
