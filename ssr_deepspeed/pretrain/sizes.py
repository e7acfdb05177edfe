"""Parameters, floating-point operations, memory and checkpoint sizes of a run, before anything is allocated.

The parameters are those of the model itself, built on torch's meta device; the rest follows from them, from the
shapes of a micro-batch and from what DeepSpeed keeps on a rank.

Shapes: B sequences, L tokens a sequence, T = B * L tokens, M model width, V vocabulary, E experts, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssr_deepspeed.pretrain.config import ModelConfig, RunConfig
from ssr_deepspeed.pretrain.model import MoELanguageModel
from ssr_deepspeed.routing import expert_capacity

# Tensors of a weight's shape that an optimizer keeps; the others that DeepSpeed knows keep two, as Adam does.
_MOMENTS = {"adagrad": 1, "lion": 1, "muon": 1, "sgd": 1}
_FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Counts of one model."""

    parameters: int
    """Of the whole model, every expert once."""
    active_parameters: int
    """Of those, what one token meets: all that is dense, and `top_k` experts a layer."""
    dense_parameters: int
    """All but the experts, held by every rank."""
    expert_parameters: int
    """Of the experts that one rank holds."""
    embedding_parameters: int
    """Of the input embedding, and of the output matrix where it is one of its own."""
    flops_per_token: int
    """Floating-point operations of forward and backward pass for one token, on active parameters."""


def sizes_of(config: RunConfig, vocabulary: int) -> Sizes:
    """Count a run's model.

    A token costs `6 N + 12 layers * width * L` operations: two for each of the N weights in matrices that it is
    multiplied with, forwards, and four backwards; and those of the attention scores and their application to the
    values over all L positions, whether masked or not. N holds the active matrices with the router and the output
    matrix, and no look-up in the embedding. Recomputation, padding, empty slots and the optimizer are not work on
    the model and do not count. Source: Kaplan et al., arXiv 2001.08361, section 2.1, and Chowdhery et al.,
    arXiv 2204.02311, appendix B, with N restricted to a token's experts.

    Args:
        config: of the run.
        vocabulary: tokens of its tokenizer.
    """
    model = config.model
    shapes = _weights(model, vocabulary)
    experts = {name for name in shapes if ".deepspeed_experts." in name}
    dense = sum(shape.numel() for name, shape in shapes.items() if name not in experts)
    local = sum(shapes[name].numel() for name in experts)
    active = local * model.ep_size * model.top_k // model.experts
    matrices = sum(shape.numel() for name, shape in shapes.items() if name not in experts and len(shape) >= 2)
    embedding = shapes["embedding.weight"].numel()
    looked_up = 0 if model.tie_embeddings else embedding
    attention = 12 * model.layers * model.width * config.data.sequence_length
    return Sizes(
        parameters=dense + local * model.ep_size,
        active_parameters=dense + active,
        dense_parameters=dense,
        expert_parameters=local,
        embedding_parameters=embedding + looked_up,
        flops_per_token=6 * (matrices - looked_up + active) + attention,
    )


def memory_of(config: RunConfig, vocabulary: int, ranks: int) -> dict[str, int]:
    """Bytes that one rank needs at the end of a backward pass, by part.

    Weights, gradients and optimizer states are DeepSpeed's to within the borders of partitions; the other parts are
    estimates of what autograd keeps of a balanced micro-batch. Not counted: offloading, the allocator's
    fragmentation, the kernels' workspaces, and the copies that DeepSpeed makes of one group of gradients in its step,
    when activations and logits are gone.

    Args:
        config: of the run.
        vocabulary: tokens of its tokenizer.
        ranks: of the job; `ep_size` of them share the experts of a layer, the others hold copies.

    Returns:
        `weights`; `gradients`; `optimizer_states` (fp32 weights where the model's are not, moments; ZeRO's share);
        `reduction_buckets`; `activations` without and with recomputation as the configuration has it;
        `dispatch_buffers` of the all-to-all, `[E, C, M]`; `logits` and their gradients.
    """
    sizes, deepspeed = sizes_of(config, vocabulary), config.deepspeed
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    width = _bytes_of_a_weight(deepspeed)
    local = sizes.dense_parameters + sizes.expert_parameters
    # What a rank keeps of states that ZeRO shares out over the ranks that hold the same weights.
    shared = sizes.dense_parameters / ranks + sizes.expert_parameters * config.model.ep_size / ranks
    accumulated = _bytes_of_a_gradient(deepspeed)
    # Beside its own accumulator a pass needs gradients of the weights' precision; ZeRO 2 has them in buckets alone.
    passing = width if stage < 2 and accumulated != width else 0
    # DeepSpeed's BF16_Optimizer takes over where ZeRO 1 accumulates in fp32, without buckets.
    bucketed = stage and zero.get("contiguous_gradients", True) and not passing
    buckets = int(zero.get("reduce_bucket_size", 5e8)) * width * (2 if zero.get("overlap_comm") else 1)
    tokens = micro_batch_of(deepspeed, ranks) * config.data.sequence_length
    activations, dispatch = _activations(config.model, tokens, width)
    return {
        "weights": local * width,
        "gradients": round((shared if stage >= 2 else local) * (accumulated + passing)),
        "optimizer_states": round((shared if stage else local) * _state_bytes(deepspeed)),
        "reduction_buckets": buckets if bucketed else 0,
        "activations": activations,
        "dispatch_buffers": dispatch,
        # Its softmax, kept for the backward pass, and there its gradient before and after it.
        "logits": tokens * vocabulary * 3 * _FP32,
    }


def checkpoint_bytes(config: RunConfig, vocabulary: int) -> int:
    """Bytes on disk of one checkpoint of all ranks together, but for a few kilobytes a file and rank."""
    sizes = sizes_of(config, vocabulary)
    updated, files = sizes.parameters, 1
    if not config.deepspeed.get("zero_optimization", {}).get("stage", 0):
        # Each rank of an expert-parallel group writes all of its states, and the first of them once more.
        updated, files = sizes.dense_parameters + sizes.expert_parameters, config.model.ep_size + 1
    weights = sizes.parameters * _bytes_of_a_weight(config.deepspeed)
    return weights + files * updated * _state_bytes(config.deepspeed)


def micro_batch_of(deepspeed: dict[str, Any], ranks: int) -> int:
    """Sequences of a rank's micro-batch, by DeepSpeed's rule for the batch sizes that are given."""
    if "train_micro_batch_size_per_gpu" in deepspeed:
        return int(deepspeed["train_micro_batch_size_per_gpu"])
    steps = deepspeed.get("gradient_accumulation_steps", 1)
    return int(deepspeed.get("train_batch_size", ranks * steps)) // (ranks * steps)


def _weights(model: ModelConfig, vocabulary: int) -> dict[str, torch.Size]:
    """Shapes of the weights that one rank holds, by name."""
    with torch.device("meta"):
        built = MoELanguageModel(model, vocabulary, seed=0, ep_rank=0)
    return {name: weight.shape for name, weight in built.named_parameters()}


def _bytes_of_a_weight(deepspeed: dict[str, Any]) -> int:
    return 2 if any(deepspeed.get(name, {}).get("enabled") for name in ("bf16", "bfloat16", "fp16")) else _FP32


def _bytes_of_a_gradient(deepspeed: dict[str, Any]) -> int:
    kind = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return _bytes_of_a_weight(deepspeed) if kind is None else _FP32 if kind in ("fp32", "float32") else 2


def _state_bytes(deepspeed: dict[str, Any]) -> int:
    """Bytes of optimizer states for each weight that a rank updates."""
    optimizer = deepspeed.get("optimizer", {})
    kind = str(optimizer.get("type", "adamw")).lower()
    # ZeRO copies its part of the weights whatever their precision is.
    master = deepspeed.get("zero_optimization", {}).get("stage", 0) or _bytes_of_a_weight(deepspeed) < _FP32
    return _FP32 * (_MOMENTS.get(kind, 2) + bool(master))


def _activations(model: ModelConfig, tokens: int, width: int) -> tuple[int, int]:
    """Bytes kept for the backward pass of a micro-batch: outside the experts' buffers, and in them."""
    with_experts = model.layers // model.moe_every
    capacity = expert_capacity(
        tokens, model.experts, model.top_k, model.capacity_factor if model.drop_tokens else 1.0, model.min_capacity
    )
    slots = model.experts * capacity
    # A norm: its input and the normed one in fp32, and its output.
    norm = tokens * model.width * (2 * _FP32 + width)
    # Two norms; queries, keys and values, two of them rotated; the attention's output by head and by token.
    attention = 2 * norm + 7 * tokens * model.width * width
    dense = 4 * tokens * model.expert_width * width
    # The router works in fp32: its input, unless that is the norm's output; logits, probabilities and their like.
    router = tokens * ((model.width if width < _FP32 else 0) + 4 * model.experts) * _FP32
    experts = 4 * slots * model.expert_width * width + router + (dense if model.residual else 0)
    # What the experts got, and what each token got back; while they work, also what was sent both ways.
    kept = (slots + model.top_k * tokens) * model.width * width
    passing = 2 * slots * model.width * width
    blocks = [attention + experts] * with_experts + [attention + dense] * (model.layers - with_experts)
    if model.activation_checkpointing == "none":
        return norm + sum(blocks), with_experts * kept + passing
    # Each block's input, and one whole block while it is recomputed.
    return norm + model.layers * tokens * model.width * width + max(blocks), kept + passing
