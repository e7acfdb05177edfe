"""Time from logits to routes, forward and backward, of TopKGate, SSR and other rules.

    python -m benchmarks.gate_speed                    # the whole grid, about ten minutes
    python -m benchmarks.gate_speed --tokens 2048 --experts 8 64 --repeats 3

All rules run in one process and in turn, A B C A B C ...; a ratio is the median over the turns of
that turn's ratio to TopKGate, so that a machine whose speed drifts does not matter. What is timed,
on one CPU thread: `TopKGate`'s own function for that k with sparse routes, its auxiliary loss and,
as by default, its random choices (they take 3 to 19 % of its time, and SSR has none); all that
`SSRGate` makes of logits, on a softmax step and on a transport step (xi = 1, tolerance 1e-3), dropping
routes or moving them, and under other balancing rules, with what they commit at a step's end;
Megatron's Sinkhorn rule, which stops at experts and weights, without slots. Capacity factor 1. `--gates`
times the whole modules instead, with the matrix product from width 512 to the logits in them. Memory is
what the tensors of one forward and backward pass hold at most, counted beside the timing.

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
from benchmarks.rivals import primal_sinkhorn
from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate

WIDTH = 512
LEAST_CAPACITY = 4


def ssr_gate(experts: int, k: int, name: str, device: str) -> SSRGate:
    config = SSRConfig.from_dict(SSR_RULES[name])
    gate = SSRGate(WIDTH, experts, k, min_capacity=LEAST_CAPACITY, config=config).to(device)
    # As an engine has it: the logits are watched.
    gate.ssr.nonfinite = torch.zeros((), dtype=torch.bool, device=device)
    return gate


def facts_of(gate: SSRGate, indices: Tensor) -> dict[str, Any]:
    facts: dict[str, Any] = {"dropped": float((indices < 0).float().mean())}
    if gate.ssr.solution is not None:
        facts |= {"sweeps": int(gate.ssr.solution.iterations), "error": float(gate.ssr.solution.error)}
    return facts


Call = Callable[[], Callable[[], dict[str, Any]]]
"""A forward and backward pass; what it returns tells afterwards, outside the timing, what came of it."""

SSR_RULES: dict[str, dict[str, Any]] = {
    "softmax": {"rule": "none"},
    "transport": {"rule": "ssr", "probability": 1.0, "entropy": 1.0, "gradient": "partial"},
    "softmax next": {"rule": "none", "overflow": "next"},
    "transport next": {"rule": "ssr", "probability": 1.0, "entropy": 1.0, "gradient": "partial", "overflow": "next"},
    "carried": {"rule": "carried", "probability": 0.0},
    "auxiliary": {"rule": "auxiliary"},
    "loss free": {"rule": "loss_free"},
    "quantile": {"rule": "quantile"},
}


def on_logits(leaf_TE: Tensor, k: int, device: str) -> dict[str, Call]:
    """Every rule on given logits."""
    experts = leaf_TE.shape[1]

    def passing(rule: Callable[[Tensor], tuple[Tensor, Callable[[], dict[str, Any]]]]) -> Call:
        def call() -> Callable[[], dict[str, Any]]:
            leaf_TE.grad = None
            # top2gating adds its noise in place, so it gets a copy; the others get the same.
            value, facts = rule(leaf_TE * 1)
            value.backward(torch.ones_like(value))
            return facts

        return call

    def topk(logits_TE: Tensor) -> tuple[Tensor, Callable[[], dict[str, Any]]]:
        if k == 1:
            out = top1gating(logits_TE, 1.0, LEAST_CAPACITY, sparse_routes=True)
        elif k == 2:
            out = top2gating(logits_TE, 1.0, LEAST_CAPACITY, sparse_routes=True)
        else:
            out = topkgating(logits_TE, k, 1.0, LEAST_CAPACITY, sparse_routes=True)
        return out[5].sum() + out[0], lambda: {"dropped": float((out[3] < 0).float().mean())}

    def ssr(gate: SSRGate) -> Callable[[Tensor], tuple[Tensor, Callable[[], dict[str, Any]]]]:
        def rule(logits_TE: Tensor) -> tuple[Tensor, Callable[[], dict[str, Any]]]:
            out = gate.routes_of(logits_TE, None, True)
            gate.commit()
            return out[5].sum() + out[0], lambda: facts_of(gate, out[3])

        return rule

    def megatron(logits_TE: Tensor) -> tuple[Tensor, Callable[[], dict[str, Any]]]:
        _, weights_TK, turns = primal_sinkhorn(logits_TE, k)
        return weights_TK.sum(), lambda: {"sweeps": turns}

    table = {"TopKGate": topk}
    table |= {name: ssr(ssr_gate(experts, k, name, device)) for name in SSR_RULES}
    table["megatron"] = megatron
    if device != "cpu":
        table["copy"] = lambda logits_TE: (logits_TE, dict)
    return {name: passing(rule) for name, rule in table.items()}


def on_gates(shape: tuple[int, int, int], device: str) -> dict[str, Call]:
    """Whole modules on random activations."""
    tokens, experts, k = shape
    torch.manual_seed(0)
    activations = torch.randn(tokens, WIDTH, device=device, requires_grad=True)

    def passing(gate: TopKGate) -> Call:
        def call() -> Callable[[], dict[str, Any]]:
            gate.zero_grad()
            activations.grad = None
            out = gate(activations, None, True)
            if isinstance(gate, SSRGate):
                gate.commit()
            (out[5].sum() + out[0]).backward()
            return lambda: facts_of(gate, out[3]) if isinstance(gate, SSRGate) else {}

        return call

    gates = {"TopKGate": TopKGate(WIDTH, experts, k, min_capacity=LEAST_CAPACITY).to(device)}
    gates |= {name: ssr_gate(experts, k, name, device) for name in SSR_RULES}
    return {name: passing(gate) for name, gate in gates.items()}


def peak_bytes(call: Call) -> int:
    """Most bytes that tensors made by `call` hold at one time, up to about one `[T, E]` inside single operators."""
    tracker = MemTracker()
    with tracker:
        call()
    return max(int(snapshot["Total"]) for snapshot in tracker.get_tracker_snapshot("peak").values())


def measure(
    calls: dict[str, Callable[[], dict[str, Any]]], repeats: int, synchronise: bool
) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    facts = {name: call()() for name, call in calls.items()}
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
                calls = on_logits(leaf_TE, k, options.device)
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
