"""Which rank holds which experts of which layer, read off DeepSpeed's own process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from deepspeed.utils import groups

from ssr_deepspeed.preflight.findings import Finding, judged
from ssr_deepspeed.preflight.job import Job, spans
from ssr_deepspeed.pretrain.config import ModelConfig
from ssr_deepspeed.pretrain.ranks import check_layout

_ROWS = 20


@dataclass(frozen=True)
class Layout:
    """Where the experts of each MoE layer are."""

    ep_groups: tuple[tuple[int, ...], ...]
    """Ranks that share the experts of a layer, in the order of their slices."""
    replicas: tuple[tuple[int, ...], ...]
    """Ranks that hold the same slice, by slice."""
    local_experts: int
    """Experts of a layer on one rank."""

    @property
    def ep_size(self) -> int:
        return len(self.ep_groups[0])

    def experts_of(self, rank: int) -> range:
        """Global indices of the experts that a rank holds in each MoE layer."""
        place = next(ranks.index(rank) for ranks in self.ep_groups if rank in ranks)
        return range(place * self.local_experts, (place + 1) * self.local_experts)


def check_experts(job: Job, model: ModelConfig) -> tuple[Finding, Layout | None]:
    """The experts can be laid out on these ranks; their layout, or None where they cannot."""
    try:
        check_layout(model, job.ranks)
    except ValueError as error:
        return judged("experts", "", failures=[str(error)]), None
    outcomes = job.attempt(lambda: _own_groups(model.ep_size))
    if failures := job.broken(outcomes):
        return judged("experts", "", failures=failures), None
    ep_groups = sorted({outcome.result[0] for outcome in outcomes})
    # Ordered by the slice that they hold: the first group of ranks has one of each.
    replicas = [outcomes[rank].result[1] for rank in ep_groups[0]]
    layout = Layout(tuple(ep_groups), tuple(replicas), model.experts // model.ep_size)
    spread = sum(len({job.hosts[rank] for rank in ranks}) > 1 for ranks in ep_groups)
    fine = (
        f"{layout.local_experts} of {model.experts} a rank and layer, each {len(replicas[0])} times, "
        f"groups of {model.ep_size} ranks"
    )
    if spread:
        fine += f"; {spread} of {len(ep_groups)} groups reach over several hosts"
    return judged("experts", fine), layout


def layout_table(job: Job, model: ModelConfig, layout: Layout) -> str:
    """Who holds which experts, in at most 21 lines: where there are more slices, neighbours share a line."""
    blocks = [block for block in range(model.layers) if (block + 1) % model.moe_every == 0]
    lines = [f"experts of the {len(blocks)} MoE layers (blocks {spans(blocks)}), and the ranks that hold them"]
    step = -(-layout.ep_size // _ROWS)
    for first in range(0, layout.ep_size, step):
        slices = range(first, min(first + step, layout.ep_size))
        experts = range(slices.start * layout.local_experts, slices.stop * layout.local_experts)
        ranks = [rank for place in slices for rank in layout.replicas[place]]
        each = f", {layout.local_experts} each" if step > 1 else ""
        lines.append(f"  {spans(experts):<12} {job.name(ranks)}{each}")
    return "\n".join(lines)


def _own_groups(ep_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks of this rank's expert-parallel group, and of those that hold the same experts."""
    name = f"ep_size_{ep_size}"
    groups._create_expert_and_data_parallel(ep_size)
    sharing, replicas = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    return tuple(dist.get_process_group_ranks(sharing)), tuple(dist.get_process_group_ranks(replicas))
