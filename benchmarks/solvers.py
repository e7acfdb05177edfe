"""The transport solvers on the shapes of MoE routing: iterations, time and error.

    python -m benchmarks.solvers                                  # about five minutes
    python -m benchmarks.solvers --tokens 8192 --entropies 1 0.1  # a part of the grid
    python -m benchmarks.solvers --trace                          # error against iterations, one problem each

For every T x E x xi and kind of router logits: what each method needs to reach the tolerance,
as iterations and milliseconds, or the error it was left at when the cap ended it (marked `>`).
fp32, one CPU thread; in `--trace` fp64, the error after every number of iterations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import KINDS, logits
from ssr_deepspeed.ot import solve

METHODS = ("sinkhorn", "newton", "sns", "adaptive")


def measure(scores_TE: Tensor, entropy: float, method: str, options: argparse.Namespace) -> dict[str, Any]:
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        solution = solve(
            scores_TE, entropy, method=method, tolerance=options.tolerance, max_iterations=options.max_iterations
        )
        seconds.append(time.perf_counter() - start)
    return {
        "iterations": int(solution.iterations),
        "error": float(solution.error),
        "converged": bool(solution.converged),
        "milliseconds": 1e3 * statistics.median(seconds),
    }


def trace(scores_TE: Tensor, entropy: float, method: str, options: argparse.Namespace) -> dict[int, float]:
    """Relative column error after each cap on the iterations."""
    errors = {}
    for cap in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 50, 100, 200, 500, 1000):
        solution = solve(scores_TE.double(), entropy, method=method, tolerance=1e-12, max_iterations=cap)
        errors[cap] = float(solution.error)
        if errors[cap] < 1e-10 or cap >= options.max_iterations:
            break
    return errors


def show(result: dict[str, Any]) -> str:
    if not result["converged"]:
        return f">{result['error']:.0e} {result['milliseconds']:8.1f}"
    return f"{result['iterations']:6d} {result['milliseconds']:8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--entropies", type=float, nargs="+", default=[1.0, 0.5, 0.1, 0.05])
    parser.add_argument("--inputs", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--max-iterations", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="error against iterations instead of times")
    parser.add_argument("--json", type=Path, help="append every line's figures to this JSON lines file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{'input':>9} {'T':>6} {'E':>4} {'xi':>5}" + "".join(f"{method:>17}" for method in options.methods))
    if not options.trace:
        print(" " * 28 + f"{'iterations':>14} ms" * len(options.methods))
    for tokens, experts, entropy, kind in itertools.product(
        options.tokens, options.experts, options.entropies, options.inputs
    ):
        scores_TE = logits(kind, tokens, experts)
        step = trace if options.trace else measure
        results = {method: step(scores_TE, entropy, method, options) for method in options.methods}
        head = f"{kind:>9} {tokens:>6} {experts:>4} {entropy:>5}"
        if options.trace:
            for method, errors in results.items():
                print(head, f"{method:>9}", " ".join(f"{cap}:{error:.0e}" for cap, error in errors.items()), flush=True)
        else:
            print(head + "".join(f"{show(result):>17}" for result in results.values()), flush=True)
        if options.json:
            cell = {"kind": kind, "tokens": tokens, "experts": experts, "entropy": entropy, "methods": results}
            with options.json.open("a") as lines:
                lines.write(json.dumps(cell) + "\n")


if __name__ == "__main__":
    main()
