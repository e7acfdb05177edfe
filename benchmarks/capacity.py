"""What capacity 1.0 without lost routes costs and saves against TopKGate's 1.25 and 2.0.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.capacity
    torchrun --standalone --nproc_per_node 2 -m benchmarks.capacity --experts 64 --k 8

Engines of DeepSpeed with the same stack of expert-parallel MoE layers take training steps in turn,
A B C A B C ..., on the same inputs: clustered activations, so that experts overflow. Per setting:
median step time and its ratio to TopKGate at 1.25, bytes that a rank hands to all-to-all in a step
(counted at the call, its own share of them included), and the share of routes without a slot. The
router is as initialised, and no setting has an auxiliary loss: this is about overflow, not balance.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

import ssr_deepspeed

# name, capacity factor, "ssr" block (None: TopKGate)
SETTINGS = [
    ("TopKGate 1.25", 1.25, None),
    ("TopKGate 2.0", 2.0, None),
    ("TopKGate 1.0", 1.0, None),
    ("SSR softmax 1.0 drop", 1.0, {"probability": 0.0}),
    ("SSR softmax 1.0 next", 1.0, {"probability": 0.0, "overflow": "next"}),
    ("SSR transport 1.0 next", 1.0, {"probability": 1.0, "overflow": "next"}),
]


class Stack(torch.nn.Module):
    """MoE layers with residual connections."""

    def __init__(self, options: argparse.Namespace, factor: float) -> None:
        super().__init__()
        width, hidden = options.width, options.hidden
        expert = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, width))
        self.layers = torch.nn.ModuleList(
            MoE(width, expert, options.experts, dist.get_world_size(), k=options.k, capacity_factor=factor)
            for _ in range(options.layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def build(options: argparse.Namespace, factor: float, block: dict[str, Any] | None) -> Any:
    torch.manual_seed(0)
    model = Stack(options, factor)
    groups = split_params_into_different_moe_groups_for_optimizer({"name": "all", "params": list(model.parameters())})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
    }
    if block is not None:
        config["ssr"] = {**block, "monitor": {"interval": 0}}
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


class Counters:
    """Bytes handed to all-to-all, and routes with and without a slot, since the last reset."""

    def __init__(self) -> None:
        self.reset()
        original = sharded_moe.dist.all_to_all_single

        def counted(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += tensor.numel() * tensor.element_size()
            return original(output, tensor, *args, **kwargs)

        sharded_moe.dist.all_to_all_single = counted

    def reset(self) -> None:
        self.bytes = self.kept = self.routes = 0

    def watch(self, engine: Any) -> None:
        def hook(_: torch.nn.Module, __: Any, output: tuple[Any, ...]) -> None:
            self.kept += int((output[3] >= 0).sum())
            self.routes += output[3].numel()

        for module in engine.module.modules():
            if isinstance(module, sharded_moe.TopKGate):
                module.register_forward_hook(hook)


def step(engine: Any, x: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    engine.backward(engine(x).square().mean())
    engine.step()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    counters = Counters()
    engines = [build(options, factor, block) for _, factor, block in SETTINGS]
    for engine in engines:
        counters.watch(engine)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    centres = torch.randn(options.experts, options.width, generator=torch.Generator().manual_seed(1))
    seconds: list[list[float]] = [[] for _ in SETTINGS]
    totals = [{"bytes": 0, "kept": 0, "routes": 0} for _ in SETTINGS]
    for turn in range(options.steps + 1):
        topics = torch.randint(options.experts, (options.tokens,), generator=generator)
        x = (centres[topics] + 0.5 * torch.randn(options.tokens, options.width, generator=generator)).unsqueeze(0)
        for index, engine in enumerate(engines):
            counters.reset()
            took = step(engine, x)
            if turn:  # the first builds operators and buffers
                seconds[index].append(took)
                for name in totals[index]:
                    totals[index][name] += getattr(counters, name)
    base = seconds[0]
    return [
        {
            "setting": name,
            "milliseconds": 1e3 * statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, base, strict=True)),
            "megabytes": total["bytes"] / options.steps / 1e6,
            "dropped": 1 - total["kept"] / total["routes"],
        }
        for (name, _, _), mine, total in zip(SETTINGS, seconds, totals, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank and step (default 4096)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="append the figures to this JSON lines file")
    options = parser.parse_args()
    deepspeed.init_distributed("gloo")
    torch.set_num_threads(1)
    ssr_deepspeed.install()
    rows = measure(options)
    if dist.get_rank() == 0:
        print(
            f"\n{dist.get_world_size()} ranks, {options.tokens} tokens each, {options.layers} layers of "
            f"{options.experts} experts, top-{options.k}, width {options.width}; fp32"
        )
        print(f"{'setting':>24} {'step ms':>8} {'ratio':>6} {'all-to-all MB':>14} {'dropped':>8}")
        for row in rows:
            print(
                f"{row['setting']:>24} {row['milliseconds']:>8.0f} {row['ratio']:>6.2f} {row['megabytes']:>14.1f}"
                f" {row['dropped']:>8.2%}"
            )
        if options.json:
            with options.json.open("a") as lines:
                lines.writelines(json.dumps({**vars(options), "json": None, **row}) + "\n" for row in rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
