"""A small MoE model on a real DeepSpeed engine, for tests that run on gloo ranks."""

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

WIDTH, EXPERTS = 16, 4


class ToyModel(torch.nn.Module):
    """Two MoE layers; every expert has weights that depend on its global index."""

    def __init__(self, ep_size=1, ep_rank=0, k=2, drop=False, moe_layers=2, **moe):
        super().__init__()
        expert = torch.nn.Sequential(torch.nn.Linear(WIDTH, 32), torch.nn.GELU(), torch.nn.Linear(32, WIDTH))
        self.layers = torch.nn.ModuleList(
            MoE(WIDTH, expert, EXPERTS, ep_size, k=k, drop_tokens=drop, **moe) for _ in range(moe_layers)
        )
        local = EXPERTS // ep_size
        with torch.no_grad():
            for name, weight in self.named_parameters():
                seed = sum(map(ord, name.split("deepspeed_experts")[0]))
                if "deepspeed_experts." in name:
                    index, rest = name.split("deepspeed_experts.")[1].split(".", 1)
                    seed += 1000 * (int(index) + ep_rank * local + 1) + sum(map(ord, rest))
                generator = torch.Generator().manual_seed(seed)
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)

    def forward(self, x, used=None):
        for layer in self.layers:
            out, _, _ = layer(x, used)
            x = x + out
        return x


def build_engine(model, block, zero=0, mpu=None, **config):
    """An engine for `model` whose configuration has the "ssr" block `block`, or none."""
    groups = split_params_into_different_moe_groups_for_optimizer({"name": "all", "params": list(model.parameters())})
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,  # the default of newer versions; deepspeed 0.16.9 does not clip
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        **config,
    }
    if block is not None:
        settings["ssr"] = block
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings, mpu=mpu)[0]


def global_name(name, ep_size, ep_rank):
    """A parameter's name with the expert's global index in place of the local one."""
    before, mark, after = name.partition("deepspeed_experts.")
    if not mark:
        return name
    index, rest = after.split(".", 1)
    return f"{before}{mark}{int(index) + ep_rank * (EXPERTS // ep_size)}.{rest}"
