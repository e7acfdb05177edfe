"""A loop of one's own over a DeepSpeed engine: two lines switch SSR on, `install()` and the "ssr" block."""

import argparse
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn
from torch.nn.functional import cross_entropy

import ssr_deepspeed

parser = argparse.ArgumentParser()
parser.add_argument("--text", default="LICENSE", help="its bytes are the data")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/plain")
parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --output")
parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
arguments = parser.parse_args()


class NextByte(nn.Module):
    """The next byte from the one before: embedding, 8 experts shared out over the ranks, head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))
        self.embedding, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.moe = MoE(width, expert, num_experts=8, ep_size=dist.get_world_size(), k=2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.moe(x)[0])


ssr_deepspeed.install()
deepspeed.init_distributed()
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = NextByte()
config = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "ssr": {"monitor": {"interval": 10}},
}
groups = split_params_into_different_moe_groups_for_optimizer({"name": "all", "params": list(model.parameters())})
engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
if arguments.resume:
    engine.load_checkpoint(arguments.output)

batches = torch.tensor(list(Path(arguments.text).read_bytes()), device=engine.device).split(8 * 128)[:-1]
for step in range(engine.global_steps, arguments.steps):
    tokens = batches[(step * ranks + rank) % len(batches)].view(8, 128)
    loss = cross_entropy(engine(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    if rank == 0:
        print(f"step {engine.global_steps} loss {loss.item()}", flush=True)
    if engine.global_steps % 10 == 0:
        engine.save_checkpoint(arguments.output)
if rank == 0:
    print(f"{type(engine.gate_modules[0]).__name__}: {engine.ssr.report}")
