"""What must be the same on every rank: software, configuration, environment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ssr_deepspeed
from ssr_deepspeed.preflight.findings import Finding, judged
from ssr_deepspeed.preflight.job import Job, shortened
from ssr_deepspeed.pretrain.config import RunConfig
from ssr_deepspeed.pretrain.deepspeed_json import check_batch

_PACKAGES = ("deepspeed", "transformers", "datasets", "tokenizers", "numpy", "triton", "accelerate")
_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_DEVICE_MAX_CONNECTIONS")


def check_versions(job: Job) -> Finding:
    """The same software everywhere, down to the source files of this package."""
    outcomes = job.attempt(_versions)
    failures = job.problems(outcomes)
    if not failures:
        failures = [
            f"{sentence}: install the same on every host" for sentence in differences(job, [o.result for o in outcomes])
        ]
    own = outcomes[0].result or {}
    fine = ", ".join(f"{name} {own.get(name)}" for name in ("python", "torch", "deepspeed", "ssr_deepspeed"))
    return judged("versions", f"{fine} and others are equal", failures=failures)


def check_environment(job: Job) -> Finding:
    """The same variables for communication; hosts may need different ones, so a difference is a warning."""
    settings = job.gather(_environment())
    warnings = [f"{sentence}: set it alike, unless the hosts differ" for sentence in differences(job, settings)]
    names = sorted(settings[0])
    return judged("environment", f"equal: {shortened(names)}" if names else "nothing set", warnings=warnings)


def check_configuration(job: Job, load: Callable[[], RunConfig]) -> tuple[Finding, RunConfig | None]:
    """The same resolved configuration on every rank, for as many as there are; it, or None where they differ."""
    outcomes = job.attempt(load)
    failures = job.problems(outcomes)
    hashes = [
        hashlib.sha256(json.dumps(outcome.result.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
        for outcome in outcomes
        if outcome.result
    ]
    if not failures and len(set(hashes)) > 1:
        told = differences(job, [_flat(outcome.result.to_dict()) for outcome in outcomes])
        failures = [f"{sentence}: give the same file and flags to every host" for sentence in told]
    config = None if failures else outcomes[job.rank].result
    if config:
        failures = _unfit(config, job.ranks)
    return judged("configuration", f"equal, with fingerprint {''.join(hashes[:1])}", failures=failures), config


def differences(job: Job, settings: list[dict[str, Any]]) -> list[str]:
    """A sentence for each name whose value is not the same on all ranks: who has another than most, and which.

    Args:
        settings: names and values of each rank, in rank order.
    """
    sentences = []
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(name) for each in settings]
        said = ["not set" if value is None else repr(value) for value in values]
        counts = Counter(said)
        if len(counts) == 1:
            continue
        # Of equally frequent values the lowest rank's counts as the usual one.
        usual, _ = counts.most_common(1)[0]
        odd: dict[str, list[int]] = {}
        for rank, value in enumerate(said):
            if value != usual:
                odd.setdefault(value, []).append(rank)
        told = shortened([f"{value} on {job.name(ranks)}" for value, ranks in odd.items()])
        sentences.append(f"{name} is {told}, and {usual} on the others")
    return sentences


def _unfit(config: RunConfig, ranks: int) -> list[str]:
    """Why the configuration is not one for this number of ranks."""
    problems = []
    for check in (lambda: config.check_ranks(ranks), lambda: check_batch(config.deepspeed, ranks)):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "backend": dist.get_backend(),
    }
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["GPU"] = torch.cuda.get_device_name()
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["ssr_deepspeed"] = f"{ssr_deepspeed.__version__} (files {_hash_of_files()})"
    return versions


def _hash_of_files() -> str:
    """Tells apart two states of a checkout that call themselves by the same version."""
    home = Path(ssr_deepspeed.__file__).parent
    total = hashlib.sha256()
    for file in sorted(home.rglob("*.py")):
        total.update(str(file.relative_to(home)).encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def _environment() -> dict[str, Any]:
    chosen = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        # Which ones may differ from rank to rank, how many may not.
        chosen["number of CUDA_VISIBLE_DEVICES"] = str(len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    return dict(sorted(chosen.items()))


def _flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Nested settings by their paths, as --set names them."""
    if not isinstance(settings, dict) or not settings:
        return {path: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{path}.{key}" if path else key))
    return flat
