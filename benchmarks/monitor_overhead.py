"""Time of the load monitor's own calls in a training step, on real engines and one CPU thread.

    python -m benchmarks.monitor_overhead                                   # three hosts, 4 and 16 layers
    python -m benchmarks.monitor_overhead --hosts topk --layers 4 --steps 60

Hosts: `deepspeed.moe.layer.MoE` with `SSRGate` and with plain `TopKGate`, and a plain Qwen3-MoE of transformers that
nothing but the monitor touches. Timed are the forward hooks, among them the one that reads `attention_mask`, and what
the engine calls at the end of a step; kernels run on the same thread, so theirs is in it. Figures are medians: the
share of the step, and microseconds a layer and step, of ordinary steps, of a window's first, where a closer look is
taken at every layer, and of its last, where the window is reduced and reported. Beside them the mean of all steps. What
an empty function costs under the same clock, after the same work, is taken off for every call and shown; and what the
kernel alone costs that reads a batch's mask, a layer, which is among the microseconds of the host that has masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.study.engines import close_engine, start_process_group
from benchmarks.study.tables import row
from ssr_deepspeed.hosts.engine import initialize
from ssr_deepspeed.pretrain.config import ModelConfig
from ssr_deepspeed.pretrain.model import MoELanguageModel

HOSTS = ("ssr", "topk", "qwen3")
COLUMNS = {
    "us a layer": "microseconds",
    "mask kernel": "mask",
    "empty": "empty",
    "first step": "first",
    "last step": "last",
    "mean": "mean",
}
WIDTH, HEADS, EXPERTS, TOP_K, EXPERT_WIDTH, VOCABULARY = 128, 4, 16, 2, 96, 512


def main(arguments: list[str] | None = None) -> None:
    """Entry point: measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--steps", type=int, default=200, help="timed steps")
    parser.add_argument("--interval", type=int, default=20, help="steps of a window")
    parser.add_argument("--tokens", type=int, default=512, help="of a step, in sequences of 128")
    parser.add_argument("--json", type=Path, help="append every measurement to this JSON-lines file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start_process_group()
    print(row("host", "layers", "step (ms)", "share (%)", *COLUMNS))
    print("|" + "---|" * (4 + len(COLUMNS)))
    for host in options.hosts:
        for layers in options.layers:
            figures = measure(host, layers, options.steps, options.interval, options.tokens)
            cells = (f"{figures[name]:.1f}" for name in COLUMNS.values())
            print(row(host, str(layers), f"{1e3 * figures['step']:.0f}", f"{100 * figures['share']:.2f}", *cells))
            if options.json:
                with options.json.open("a") as lines:
                    lines.write(json.dumps({"host": host, "layers": layers, **figures}) + "\n")


def measure(host: str, layers: int, steps: int, interval: int, tokens: int) -> dict[str, float]:
    """Medians over the steps of one engine.

    Returns:
        `step`: seconds of a step; `share`: of the monitor's calls in it; `microseconds`, `first` and `last`: of
        these calls a layer, in ordinary steps and in the first and last ones of a window; `mean`: over all steps;
        `empty`: microseconds of an empty function; `mask`: of the kernel that reads a mask, a layer.
    """
    engine, batch = _engine(host, layers, interval, tokens)
    clock, empty, kernel = _Clock(), _Clock(), _Clock()
    clock.watch(engine)
    nothing, read_mask = empty.timed(lambda: None), kernel.timed(lambda mask_BL: mask_BL.ne(0))
    seconds, calls, numbers, kernels = [], [], [], []
    warmup = interval
    for step in range(warmup + steps):
        inputs = batch(step)
        clock.seconds, clock.calls, kernel.seconds, began = 0.0, 0, 0.0, time.perf_counter()
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        nothing()
        seconds.append(time.perf_counter() - began)
        if "attention_mask" in inputs:
            read_mask(inputs["attention_mask"])
        kernels.append(kernel.seconds)
        calls.append(clock.seconds)
        numbers.append(clock.calls)
    close_engine(engine)
    timed = range(warmup, warmup + steps)
    nothings = empty.seconds / (warmup + steps)
    calls = [measured - number * nothings for measured, number in zip(calls, numbers, strict=True)]

    def median(chosen: Callable[[int], bool]) -> float:
        return 1e6 / layers * statistics.median(calls[step] for step in timed if chosen(step % interval))

    return {
        "step": statistics.median(seconds[step] for step in timed),
        "share": statistics.median(calls[step] / seconds[step] for step in timed),
        "microseconds": median(lambda place: 0 < place < interval - 1),
        "first": median(lambda place: place == 0),
        "last": median(lambda place: place == interval - 1),
        "mean": 1e6 / layers * statistics.mean(calls[step] for step in timed),
        "empty": 1e6 * nothings,
        "mask": 1e6 / layers * statistics.median(kernels[step] for step in timed),
    }


class _Clock:
    """Sums the seconds of the calls that it is put around."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            self.calls += 1
            return result

        return call

    def watch(self, engine: Any) -> None:
        """Put it around all that the monitor does in this engine's steps."""
        monitor = engine.ssr._monitor
        for handle in [*monitor._hooks, *engine.ssr._hooks]:
            hooks = handle.hooks_dict_ref()
            hooks[handle.id] = self.timed(hooks[handle.id])
        monitor.end_step = self.timed(monitor.end_step)


def _engine(host: str, layers: int, interval: int, tokens: int) -> tuple[Any, Callable[[int], dict[str, Tensor]]]:
    """An engine, and its batch at a step."""
    torch.manual_seed(0)
    model = _qwen3(layers) if host == "qwen3" else _native(layers)
    groups = split_params_into_different_moe_groups_for_optimizer({"name": "all", "params": list(model.parameters())})
    config = {
        "train_micro_batch_size_per_gpu": tokens // 128,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "ssr": {"enabled": host == "ssr", "monitor": {"interval": interval}},
    }
    engine = initialize(model=model, model_parameters=groups, config=config)[0]

    def batch(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        text_BL = torch.randint(VOCABULARY, (tokens // 128, 128), generator=generator)
        if host == "qwen3":
            return {"input_ids": text_BL, "attention_mask": torch.ones_like(text_BL), "labels": text_BL}
        return {"tokens_BL": text_BL, "labels_BL": text_BL}

    return engine, batch


def _native(layers: int) -> nn.Module:
    shape = {"layers": layers, "width": WIDTH, "heads": HEADS, "experts": EXPERTS, "top_k": TOP_K}
    config = ModelConfig.from_dict({**shape, "expert_width": EXPERT_WIDTH}, "model")
    return MoELanguageModel(config, VOCABULARY, seed=0, ep_rank=0)


def _qwen3(layers: int) -> nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=EXPERT_WIDTH,
            moe_intermediate_size=EXPERT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=WIDTH // HEADS,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        )
    )


if __name__ == "__main__":
    main()
