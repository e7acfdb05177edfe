"""All checks in their order, on all ranks of an initialised process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ssr_deepspeed.preflight.equality import check_configuration, check_environment, check_versions
from ssr_deepspeed.preflight.findings import Finding, skipped
from ssr_deepspeed.preflight.hosts import check_clocks, check_memory
from ssr_deepspeed.preflight.job import Job
from ssr_deepspeed.preflight.joined import check_devices, check_ranks
from ssr_deepspeed.preflight.layout import Layout, check_experts, layout_table
from ssr_deepspeed.preflight.links import check_links
from ssr_deepspeed.preflight.network import check_all_reduce, check_all_to_all
from ssr_deepspeed.preflight.storage import check_disk, check_output
from ssr_deepspeed.preflight.text import check_text
from ssr_deepspeed.pretrain.config import RunConfig, load_run
from ssr_deepspeed.pretrain.folder import Existing
from ssr_deepspeed.pretrain.sizes import micro_batch_of
from ssr_deepspeed.routing import expert_capacity


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    config: str
    """Run file, or the name of one."""
    overrides: Sequence[str] = ()
    """`KEY=VALUE` of --set."""
    output: Path | None = None
    """The run's folder."""
    existing: Existing = "resume"
    """What to do with a run that the folder holds; `refuse`: it may hold none."""
    expect_ranks: int | None = None
    """Ranks that must have joined, whatever a scheduler promises."""
    hostfile: Path | None = None
    """Of DeepSpeed's launcher."""
    quick: bool = False
    """No bandwidths."""


def run_checks(job: Job, request: Request) -> tuple[list[Finding], str]:
    """Do all checks; what they found and the table of the experts, equal on all ranks.

    What cannot be checked for another failure's sake is among them as skipped.
    """
    devices = check_devices(job)
    findings = [check_ranks(job, request.expect_ranks, request.hostfile), devices]
    findings += [check_versions(job), check_environment(job)]
    configured, config = check_configuration(job, lambda: load_run(request.config, list(request.overrides)))
    findings.append(configured)
    layout: Layout | None = None
    if devices.failed:
        findings += [skipped(name, "see devices") for name in ("experts", "all-reduce", "all-to-all", "links")]
    else:
        if config:
            experts, layout = check_experts(job, config.model)
            findings.append(experts)
        else:
            findings.append(skipped("experts", "see configuration"))
        findings += _check_network(job, config, layout, timed=not request.quick)
    findings.append(check_clocks(job))
    findings += _check_supplies(job, request, config)
    return findings, layout_table(job, config.model, layout) if config and layout else ""


def _check_network(job: Job, config: RunConfig | None, layout: Layout | None, timed: bool) -> list[Finding]:
    """A network that fails a collective is not asked for the next."""
    all_reduce = check_all_reduce(job, timed)
    if all_reduce.failed:
        return [all_reduce, *(skipped(name, "see all-reduce") for name in ("all-to-all", "links"))]
    if config is None or layout is None:
        all_to_all = skipped("all-to-all", "see experts")
    else:
        all_to_all = check_all_to_all(job, layout, _dispatched(config, job.ranks), _dtype(config), timed)
    links = check_links(job) if timed else skipped("links", "--quick")
    return [all_reduce, all_to_all, links]


def _check_supplies(job: Job, request: Request, config: RunConfig | None) -> list[Finding]:
    """Text, memory and disk for the run."""
    output = request.output
    findings = [check_output(job, output, request.existing) if output else skipped("output", "no --output is given")]
    if config is None:
        return [*findings, *(skipped(name, "see configuration") for name in ("text", "memory", "disk"))]
    text, vocabulary = check_text(job, config.data)
    findings += [text, check_memory(job, config, vocabulary)]
    disk = (
        check_disk(job, output, request.existing, config, vocabulary)
        if output
        else skipped("disk", "no --output is given")
    )
    return [*findings, disk]


def _dispatched(config: RunConfig, ranks: int) -> int:
    """Elements that a rank sends in one dispatch, `[E, C, M]`; of a balanced one where no route is dropped."""
    model, tokens = config.model, micro_batch_of(config.deepspeed, ranks) * config.data.sequence_length
    factor = model.capacity_factor if model.drop_tokens else 1.0
    capacity = expert_capacity(tokens, model.experts, model.top_k, factor, model.min_capacity)
    return model.experts * capacity * model.width


def _dtype(config: RunConfig) -> torch.dtype:
    if any(config.deepspeed.get(name, {}).get("enabled") for name in ("bf16", "bfloat16")):
        return torch.bfloat16
    return torch.float16 if config.deepspeed.get("fp16", {}).get("enabled") else torch.float32
