"""A small vision transformer whose feed-forward layers are `deepspeed.moe.layer.MoE`.

    pixels [N,H,W] -> patches [N,P,pixels] -> embedding [N,P,M] -> blocks [N,P,M] -> mean [N,M] -> logits [N,classes]

Pre-normalisation with RMSNorm, learned positions, SwiGLU experts, no biases. Every block has experts.

Shapes: N images, H rows, W columns, P patches (tokens) an image, M model width, D head width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from ssr_deepspeed.pretrain.model import SwiGLU


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The architecture."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    expert_width: int = 64
    patch: int = 4
    """Pixels of a patch's side; divides the image's."""
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"model.width = {self.width} is no multiple of model.heads = {self.heads}: change one")


class Block(nn.Module):
    """Self-attention and experts, each behind its norm and beside its residual."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(config.width)
        self.w_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.w_out = nn.Linear(config.width, config.width, bias=False)
        self.experts_norm = nn.RMSNorm(config.width)
        self.experts = MoE(
            config.width,
            SwiGLU(config.width, config.expert_width),
            num_experts=config.experts,
            k=config.top_k,
            capacity_factor=config.capacity_factor,
            eval_capacity_factor=config.eval_capacity_factor,
        )

    def forward(self, x_NPM: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output and the gate's auxiliary loss (0-dim)."""
        qkv = self.w_qkv(self.attention_norm(x_NPM)).unflatten(2, (3, self.heads, -1))
        mixed_NHPD = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x_NPM = x_NPM + self.w_out(mixed_NHPD.transpose(1, 2).flatten(2))
        out_NPM, l_aux, _ = self.experts(self.experts_norm(x_NPM))
        return x_NPM + out_NPM, l_aux


class VisionTransformer(nn.Module):
    """The classifier.

    Args:
        config: the architecture.
        side: pixels of an image's side.
        classes: number of classes.
        mean: of the training pixels.
        deviation: their standard deviation.
        seed: of the weights; every expert draws its own.

    Raises:
        ValueError: the patches do not tile the image.
    """

    def __init__(
        self, config: VisionConfig, *, side: int, classes: int, mean: float, deviation: float, seed: int
    ) -> None:
        super().__init__()
        if side % config.patch:
            raise ValueError(f"model.patch = {config.patch} does not divide images of {side} pixels a side")
        self.patch, self.mean, self.deviation = config.patch, mean, deviation
        self.tokens, self.experts = (side // config.patch) ** 2, config.experts
        self.embedding = nn.Linear(config.patch**2, config.width, bias=False)
        self.positions_PM = nn.Parameter(torch.empty(self.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, classes, bias=False)
        # MoE copies one expert, so that all would start alike.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(self.positions_PM, std=0.02)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
            # From zero it learns to see what helps; random, it would pass the noise of single pixels on as well.
            nn.init.zeros_(self.embedding.weight)

    def forward(self, pixels_NHW: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[N, classes]` and the sum of the gates' auxiliary losses (0-dim), for pixels in [0, 1]."""
        scaled_N1HW = ((pixels_NHW - self.mean) / self.deviation).unsqueeze(1)
        patches_NPX = F.unfold(scaled_N1HW, self.patch, stride=self.patch).transpose(1, 2)
        x_NPM = self.embedding(patches_NPX) + self.positions_PM
        losses = []
        for block in self.blocks:
            x_NPM, l_aux = block(x_NPM)
            losses.append(l_aux)
        return self.head(self.norm(x_NPM).mean(1)), torch.stack(losses).sum()
