"""Time from logits to routes, forward and backward, of TopKGate, SSR and other rules.

    python -m benchmarks.gate_speed                    # the whole grid, about ten minutes
    python -m benchmarks.gate_speed --tokens 2048 --experts 8 64 --repeats 3

All rules run in one process and in turn, A B C A B C ...; a ratio is the median over the turns of
that turn's ratio to TopKGate, so that a machine whose speed drifts does not matter. What is timed,
on one CPU thread: `TopKGate`'s own function for that k (sparse routes) with its auxiliary loss;
SSR's routes, capacity slots and surviving weights on a softmax step and on a transport step
(xi = 1, tolerance 1e-3); Megatron's Sinkhorn rule and Quantile Balancing, which stop at experts and
weights, without slots. Capacity factor 1. `--gates` times the whole modules instead, with the
matrix product from width 512 to the logits in them. Memory is what the tensors of one forward and
backward pass hold at most, counted beside the timing.

On a GPU (`--device cuda`) the fused kernels are used where they fit, and a rule `copy` is added, which
reads the logits once and writes as much, forward and backward: what the memory allows at best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from deepspeed.moe.sharded_moe import TopKGate, top1gating, top2gating, topkgating
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.inputs import KINDS, logits
from benchmarks.rivals import QuantileBalancing, primal_sinkhorn
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.routing import expert_capacity, fill_slots, route, surviving_weights, transport_potentials

WIDTH = 512
LEAST_CAPACITY = 4


def topk_routes(logits_TE: Tensor, k: int) -> tuple[Tensor, dict[str, Any]]:
    if k == 1:
        out = top1gating(logits_TE, 1.0, LEAST_CAPACITY, sparse_routes=True)
    elif k == 2:
        out = top2gating(logits_TE, 1.0, LEAST_CAPACITY, sparse_routes=True)
    else:
        out = topkgating(logits_TE, k, 1.0, LEAST_CAPACITY, sparse_routes=True)
    return out[5].sum() + out[0], {}


def ssr_routes(logits_TE: Tensor, k: int, config: SSRConfig, transport: bool) -> tuple[Tensor, dict[str, Any]]:
    potentials_E, facts = None, {}
    capacity = expert_capacity(*logits_TE.shape, k, 1.0, LEAST_CAPACITY)
    if transport:
        potentials_E, solution = transport_potentials(logits_TE, config, None, None)
        facts = {"sweeps": int(solution.iterations), "error": float(solution.error)}
    moved = capacity if config.overflow == "next" else None
    plan = route(logits_TE, potentials_E, k=k, capacity=moved)
    slots = fill_slots(plan, capacity)
    facts["dropped"] = 1 - float(slots.kept_TK.float().mean())
    return surviving_weights(plan, slots.kept_TK).sum(), facts


def rules(experts: int, device: str) -> dict[str, Callable[[Tensor, int], tuple[Tensor, dict[str, Any]]]]:
    """Every rule by its column's name; each gives something to differentiate and what to report."""
    config, moving = SSRConfig(), SSRConfig(overflow="next")
    quantile = QuantileBalancing(experts, device)

    def megatron(logits_TE: Tensor, k: int) -> tuple[Tensor, dict[str, Any]]:
        _, weights_TK, turns = primal_sinkhorn(logits_TE, k)
        return weights_TK.sum(), {"sweeps": turns}

    copy = {"copy": lambda logits_TE, k: (logits_TE, {})} if device != "cpu" else {}
    return {
        "TopKGate": topk_routes,
        "softmax": lambda logits_TE, k: ssr_routes(logits_TE, k, config, False),
        "transport": lambda logits_TE, k: ssr_routes(logits_TE, k, config, True),
        "softmax next": lambda logits_TE, k: ssr_routes(logits_TE, k, moving, False),
        "transport next": lambda logits_TE, k: ssr_routes(logits_TE, k, moving, True),
        "megatron": megatron,
        "quantile": lambda logits_TE, k: (quantile(logits_TE, k)[1].sum(), {}),
        **copy,
    }


def on_logits(
    rule: Callable[[Tensor, int], tuple[Tensor, dict[str, Any]]], leaf_TE: Tensor, k: int
) -> Callable[[], dict[str, Any]]:
    """The timed call: forward and backward of one rule on one input."""

    def call() -> dict[str, Any]:
        leaf_TE.grad = None
        # top2gating adds its noise in place, so it gets a copy; the others get the same.
        value, facts = rule(leaf_TE * 1, k)
        value.backward(torch.ones_like(value))
        return facts

    return call


def on_gates(shape: tuple[int, int, int], device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Whole modules on random activations: `TopKGate`, and `SSRGate` on both kinds of step."""
    tokens, experts, k = shape
    torch.manual_seed(0)
    activations = torch.randn(tokens, WIDTH, device=device, requires_grad=True)

    def call(gate: TopKGate) -> dict[str, Any]:
        gate.zero_grad()
        activations.grad = None
        output = gate(activations, None, True)
        (output[5].sum() + output[0]).backward()
        return {}

    gates = {"TopKGate": TopKGate(WIDTH, experts, k, min_capacity=LEAST_CAPACITY)}
    for name, probability in (("softmax", 0.0), ("transport", 1.0)):
        config = SSRConfig(probability=probability)
        gates[name] = SSRGate(WIDTH, experts, k, min_capacity=LEAST_CAPACITY, config=config)
    for gate in gates.values():
        gate.to(device)
    return {name: lambda gate=gate: call(gate) for name, gate in gates.items()}


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that tensors made by `call` hold at one time."""
    tracker = MemTracker()
    with tracker:
        call()
    return max(int(snapshot["Total"]) for snapshot in tracker.get_tracker_snapshot("peak").values())


def measure(
    calls: dict[str, Callable[[], dict[str, Any]]], repeats: int, synchronise: bool
) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    facts = {name: call() for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if synchronise:
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    host = seconds["TopKGate"]
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, host, strict=True)),
            "bytes": peak_bytes(calls[name]),
            **facts[name],
        }
        for name, mine in seconds.items()
    }


def show(cell: dict[str, Any]) -> str:
    text = f"{cell['kind']:>9} {cell['tokens']:>6} {cell['experts']:>4} {cell['k']:>2}"
    for name, result in cell["rules"].items():
        if name == "TopKGate":
            text += f"{result['milliseconds']:>10.2f}"
            continue
        sweeps = f" {result['sweeps']:>3}" if "sweeps" in result else ""
        text += f"{result['ratio']:>{14 - len(sweeps)}.2f}{sweeps}"
    return text


def summarise(cells: list[dict[str, Any]]) -> None:
    print("\nratio of times to TopKGate: geometric mean, worst cell; E >= 64 alone; ratio of peak memory, worst cell")
    for name in cells[0]["rules"]:
        if name == "TopKGate":
            continue
        ratios = [cell["rules"][name]["ratio"] for cell in cells]
        wide = [cell["rules"][name]["ratio"] for cell in cells if cell["experts"] >= 64]
        memory = [cell["rules"][name]["bytes"] / cell["rules"]["TopKGate"]["bytes"] for cell in cells]
        wide_text = f"{statistics.geometric_mean(wide):.2f}, {max(wide):.2f}" if wide else "-"
        dropped = [cell["rules"][name].get("dropped", math.nan) for cell in cells]
        print(
            f"{name:>15}: {statistics.geometric_mean(ratios):.2f}, {max(ratios):.2f}; {wide_text}; {max(memory):.2f}"
            + ("" if math.isnan(max(dropped)) else f"; dropped routes at most {max(dropped):.1%}")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--inputs", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--repeats", type=int, default=5, help="turns of every cell (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--gates", action="store_true", help="whole modules on random activations")
    parser.add_argument("--json", type=Path, help="write every cell to this JSON lines file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    cells = []
    for tokens, experts, k in itertools.product(options.tokens, options.experts, options.k):
        for kind in ("random",) if options.gates else options.inputs:
            if options.gates:
                calls = on_gates((tokens, experts, k), options.device)
            else:
                leaf_TE = logits(kind, tokens, experts).to(options.device).requires_grad_()
                table = rules(experts, options.device)
                calls = {name: on_logits(rule, leaf_TE, k) for name, rule in table.items()}
            cell = {
                "kind": kind,
                "tokens": tokens,
                "experts": experts,
                "k": k,
                "threads": options.threads,
                "device": options.device,
            }
            cell["rules"] = measure(calls, options.repeats, options.device != "cpu")
            if not cells:
                print(
                    f"{'input':>9} {'T':>6} {'E':>4} {'k':>2}  TopKGate"
                    + "".join(f"{n:>14}" for n in calls if n != "TopKGate")
                )
                print(f"{'':24} ms, then ratio to it (and sweeps)")
            print(show(cell), flush=True)
            cells.append(cell)
            if options.json:
                with options.json.open("a") as lines:
                    lines.write(json.dumps(cell) + "\n")
    summarise(cells)


if __name__ == "__main__":
    main()
