"""What a checkpoint's folder must hold, and the newest one that holds it.

A checkpoint is written into `step_N.partial`, which gets its manifest and its name `step_N` when every
rank has written everything: a folder called `step_N` was complete once. Whether it still is, sizes and
CRC-32 sums in the manifest tell: a size finds truncation, a sum every changed bit; both are taken while the files are
written, and reading them back is dealt out over the ranks.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed.comm as dist

from ssr_deepspeed.collectives import gather_objects
from ssr_deepspeed.files import replace_text
from ssr_deepspeed.section import Section

MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = ".partial"
_DAMAGED = ".damaged"
_BLOCK = 2**22


@dataclass(frozen=True, kw_only=True)
class Manifest(Section):
    """A complete checkpoint: what it was taken at, and its files."""

    step: int
    """Optimizer steps taken."""
    samples: int
    """Sequences consumed by all ranks together: the position in the data."""
    seconds: float
    """Of training so far."""
    ranks: int
    """Processes that wrote it."""
    ep_size: int
    owes_evaluation: bool
    """The step's evaluation was due and has not been recorded."""
    files: dict[str, list[int]]
    """By name, size in bytes and CRC-32."""

    @property
    def tag(self) -> str:
        return tag(self.step)

    def write(self, folder: Path) -> None:
        content = self.to_dict()
        text = json.dumps({"checkpoint": content, "crc32": _own_sum(content)}, indent=1)
        replace_text(folder / MANIFEST, text + "\n", durable=True)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises: OSError, or ValueError where it is not what was written."""
        whole = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = whole.get("checkpoint") if isinstance(whole, dict) else None
        if content is None or whole.get("crc32") != _own_sum(content):
            raise ValueError("it has changed since it was written")
        return cls.from_dict(content, "")


def _own_sum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def tag(step: int) -> str:
    """A checkpoint's folder in `checkpoints/`."""
    return f"step_{step}"


def by_step(folder: Path) -> list[Path]:
    """The folders of checkpoints that were complete, the oldest first."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def choose(folder: Path) -> tuple[Manifest | None, list[str]]:
    """The newest whole checkpoint, None where none was ever complete; sentences on damaged newer ones.

    All ranks decide together, by what each of them has read of it.

    Raises:
        ValueError: on every rank alike, when there are checkpoints and none is whole, or when a rank does not see
            what rank 0 sees.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    names = gather_objects([path.name for path in by_step(folder)])[0]
    damages: list[str] = []
    for name in reversed(names):
        found = gather_objects(_inspect(folder / name, rank, ranks))
        blind = [number for number, (sees, _, _) in enumerate(found) if not sees]
        if blind and found[0][0]:
            raise ValueError(
                f"ranks {blind} do not see the checkpoint {folder / name}: put --output on a shared file system"
            )
        problems = [problem for _, _, problem in found if problem]
        if not problems:
            return found[0][1], damages
        damages.append(f"the checkpoint {folder / name} is damaged ({problems[0]})")
    if damages:
        raise ValueError(
            f"{'; '.join(damages)}: no checkpoint of this run is whole. Restore one, or --overwrite the run"
        )
    return None, []


def set_aside(folder: Path, newest: Manifest) -> None:
    """Make room for the steps after a checkpoint: damaged newer ones get another name, and `latest` names this one."""
    for path in by_step(folder):
        if int(path.name.removeprefix("step_")) > newest.step:
            aside, number = path.with_name(path.name + _DAMAGED), 1
            while aside.exists():
                aside, number = path.with_name(f"{path.name}{_DAMAGED}.{number}"), number + 1
            path.rename(aside)
    replace_text(folder / LATEST, newest.tag, durable=True)


def _inspect(home: Path, rank: int, ranks: int) -> tuple[bool, Manifest | None, str | None]:
    """Whether this rank sees the checkpoint, what it says, and what is wrong with this rank's share of its files."""
    if not home.is_dir():
        return False, None, "it is gone"
    try:
        manifest = Manifest.read(home)
    except FileNotFoundError:
        return True, None, f"it has no {MANIFEST}"
    except (OSError, ValueError) as error:
        return True, None, f"{MANIFEST} cannot be read: {error}"
    for name in sorted(manifest.files)[rank::ranks]:
        problem = _compare(home / name, *manifest.files[name])
        if problem:
            return True, manifest, problem
    return True, manifest, None


def _compare(file: Path, size: int, checksum: int) -> str | None:
    try:
        there = file.stat().st_size
        if there != size:
            return f"{file.name} has {there:,} bytes and should have {size:,}"
        found = 0
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                found = zlib.crc32(block, found)
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    return None if found == checksum else f"{file.name} has changed since it was written"
