"""A decoder language model whose feed-forward layers are `deepspeed.moe.layer.MoE`.

    tokens [B,L] -> embedding [B,L,M] -> blocks [B,L,M] -> logits [B,L,V]
    block: x + attention(norm(x)), then x + experts(norm(x))

Pre-normalisation with RMSNorm, rotary positions, SwiGLU experts, no biases.

Shapes: B sequences, L tokens a sequence, T = B * L tokens, M model width, H heads, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssr_deepspeed.pretrain.config import ModelConfig

IGNORED = -100
"""Label of a position without a target."""


class Output(NamedTuple):
    loss: Tensor
    """Mean cross-entropy over the targets in nats, plus the weighted auxiliary loss; 0-dim."""
    nats: Tensor
    """Sum of the cross-entropy over the targets, without gradient; 0-dim."""
    counts_NE: Tensor
    """Routes each expert of each of the N MoE layers was asked to take, on this rank; int64."""


class SwiGLU(nn.Module):
    """`W_out (silu(W_gate x) * W_in x)`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(width, hidden, bias=False)
        self.w_in = nn.Linear(width, hidden, bias=False)
        self.w_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(F.silu(self.w_gate(x)) * self.w_in(x))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.w_qkv = nn.Linear(width, 3 * width, bias=False)
        self.w_out = nn.Linear(width, width, bias=False)

    def forward(self, x_BLM: Tensor, rotation_LD: Tensor) -> Tensor:
        batch, length, width = x_BLM.shape
        qkv = self.w_qkv(x_BLM).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHLD = F.scaled_dot_product_attention(_rotate(q, rotation_LD), _rotate(k, rotation_LD), v, is_causal=True)
        return self.w_out(out_BHLD.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside its residual."""

    def __init__(self, config: ModelConfig, with_experts: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.feed_forward_norm = nn.RMSNorm(config.width)
        feed_forward = SwiGLU(config.width, config.expert_width)
        self.feed_forward: nn.Module = feed_forward
        self.dropout = _dropout(config)
        if with_experts:
            self.feed_forward = MoE(
                config.width,
                feed_forward,
                num_experts=config.experts,
                ep_size=config.ep_size,
                k=config.top_k,
                capacity_factor=config.capacity_factor,
                eval_capacity_factor=config.eval_capacity_factor,
                min_capacity=config.min_capacity,
                drop_tokens=config.drop_tokens,
                use_residual=config.residual,
            )

    def forward(self, x_BLM: Tensor, rotation_LD: Tensor, used_T: Tensor | None) -> tuple[Tensor, ...]:
        """The block's output; with experts also their auxiliary loss (0-dim) and demand (`[E]`)."""
        x_BLM = x_BLM + self.dropout(self.attention(self.attention_norm(x_BLM), rotation_LD))
        normed_BLM = self.feed_forward_norm(x_BLM)
        if not isinstance(self.feed_forward, MoE):
            return (x_BLM + self.dropout(self.feed_forward(normed_BLM)),)
        out_BLM, l_aux, counts_E = self.feed_forward(normed_BLM, used_T)
        return x_BLM + self.dropout(out_BLM), l_aux, counts_E


class MoELanguageModel(nn.Module):
    """The language model.

    Args:
        config: the architecture.
        vocabulary: number of tokens.
        seed: of the weights. Every dense weight is the same on all ranks, and every expert has
            weights of its own that depend on its global index, whatever the number of ranks.
        ep_rank: which slice of the experts this rank holds.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int, ep_rank: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.dropout = _dropout(config)
        self.blocks = nn.ModuleList(
            Block(config, with_experts=(index + 1) % config.moe_every == 0) for index in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialise(seed, ep_rank)

    @torch.no_grad()
    def _initialise(self, seed: int, ep_rank: int) -> None:
        """Normal weights of standard deviation 0.02; those that write to the residual stream smaller with depth."""
        if self.embedding.weight.is_meta:
            return  # built to be counted
        local_experts = self.config.experts // self.config.ep_size
        for name, weight in sorted(self.named_parameters()):
            if weight.dim() < 2:
                continue
            key = name
            if ".deepspeed_experts." in name:
                before, after = name.split(".deepspeed_experts.")
                index, rest = after.split(".", 1)
                key = f"{before}.{int(index) + ep_rank * local_experts}.{rest}"
            generator = torch.Generator().manual_seed(_seed_of(seed, key))
            scale = 0.02 / math.sqrt(2 * self.config.layers) if "w_out" in name else 0.02
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)

    def forward(self, tokens_BL: Tensor, labels_BL: Tensor, used_BL: Tensor | None = None) -> Output:
        """Predict the labels.

        Args:
            tokens_BL: int64.
            labels_BL: int64, the token after each one; `IGNORED` where there is none.
            used_BL: zero for padding, which no expert sees; None for no padding.
        """
        x_BLM = self.dropout(self.embedding(tokens_BL))
        rotation_LD = _rotation(tokens_BL.shape[1], self.config, x_BLM.device)
        # Flat: TopKGate with k = 1 takes no other shape.
        used_T = None if used_BL is None else used_BL.flatten()
        losses, counts = [], []
        for block in self.blocks:
            x_BLM, *rest = self._run(block, x_BLM, rotation_LD, used_T)
            if rest:
                losses.append(rest[0])
                counts.append(rest[1])
        logits_BLV = self.head(self.norm(x_BLM)).float()
        targets = (labels_BL != IGNORED).sum()
        nats = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = nats / targets.clamp_min(1) + self.config.auxiliary_loss * torch.stack(losses).sum()
        return Output(loss, nats.detach(), torch.stack(counts))

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        kind = self.config.activation_checkpointing
        if kind == "none" or not self.training:
            return block(*inputs)
        if kind == "deepspeed":
            return deepspeed.checkpointing.checkpoint(block, *inputs)
        return checkpoint(block, *inputs, use_reentrant=kind == "reentrant")


def _dropout(config: ModelConfig) -> nn.Module:
    # One with nothing to drop would still draw random numbers.
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


def _seed_of(seed: int, name: str) -> int:
    word = seed
    for byte in name.encode():
        word = (word * 1_000_003 + byte + 1) % 2**63
    return word


def _rotation(length: int, config: ModelConfig, device: torch.device) -> Tensor:
    """`[L, head width]`: cosines, then sines. fp32 whatever the engine's dtype."""
    half = config.width // config.heads // 2
    frequency = config.rope_base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _rotate(x_BHLD: Tensor, rotation_LD: Tensor) -> Tensor:
    """Rotary position embedding on halves (Su et al., arXiv 2104.09864)."""
    cos, sin = rotation_LD.chunk(2, dim=1)
    a, b = x_BHLD.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BHLD.dtype)
