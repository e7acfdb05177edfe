import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig

from ssr_deepspeed.pretrain.checkpoint import Checkpoints
from ssr_deepspeed.pretrain.model import MoELanguageModel
from ssr_deepspeed.pretrain.sizes import checkpoint_bytes, memory_of, micro_batch_of, sizes_of
from ssr_deepspeed.pretrain.train import _build_engine
from tests.gloo import run_ranks
from tests.pretrain.tiny import tiny_run

V = 257
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 and fp32 sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.mark.parametrize(
    "model", [{}, {"moe_every": 2}, {"residual": True}, {"tie_embeddings": False}, {"top_k": 1, "ep_size": 4}], ids=str
)
def test_the_counts_are_those_of_the_model(model, cache):
    config = tiny_run(cache, model={"layers": 3, **model})
    before = torch.get_rng_state()
    sizes = sizes_of(config, V)
    assert torch.equal(torch.get_rng_state(), before)
    ranks = [
        dict(MoELanguageModel(config.model, V, 0, rank).named_parameters()) for rank in range(config.model.ep_size)
    ]
    experts = [sum(w.numel() for name, w in held.items() if "deepspeed_experts" in name) for held in ranks]
    dense = sum(w.numel() for w in ranks[0].values()) - experts[0]
    assert (sizes.dense_parameters, sizes.expert_parameters) == (dense, experts[0])
    assert sizes.parameters == dense + sum(experts)
    assert sizes.active_parameters == dense + sum(experts) * config.model.top_k // 4
    assert sizes.embedding_parameters == V * 32 * (1 if config.model.tie_embeddings else 2)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step(engine):
    tokens = torch.randint(0, V, (4, 65))
    engine.backward(engine(tokens[:, :-1], tokens[:, 1:]).loss)
    held = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
    for parts in getattr(engine.optimizer, "all_grad_tensors", {}).values():
        held += parts or []
    # Accumulators of another precision, of ZeRO 2 and of ZeRO 1.
    for parts in getattr(engine.optimizer, "averaged_gradients", {}).values():
        held += [parts.flat_partition] if hasattr(parts, "flat_partition") else []
    held += getattr(engine.optimizer, "fp32_groups_gradients_flat", [])
    return _bytes(held)


def _held(config):
    """What an engine really holds, by the names of `memory_of`."""
    engine = _build_engine(config, V, dist.get_rank())
    # The first of two micro-batches: gradients are there and not yet used.
    gradients = _step(engine)
    engine.step()
    _step(engine)
    engine.step()
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = [weight for group in base.param_groups for weight in group["params"]]
    states = [state for weight in weights for state in base.state[weight].values() if state.dim()]
    own = {weight.data_ptr() for weight in engine.module.parameters()}
    return {
        "weights": _bytes(engine.module.parameters()),
        "gradients": gradients,
        "optimizer_states": _bytes([*states, *(weight for weight in weights if weight.data_ptr() not in own)]),
    }


CASES = [
    (ranks, ep_size, stage, precision)
    for ranks, ep_size in ((1, 1), (2, 1), (2, 2))
    for stage in (0, 1, 2)
    for precision in PRECISIONS
    if (stage, precision) != (0, "bf16 and fp32 sums")  # DeepSpeed refuses it
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "ep_size", "stage", "precision"), CASES)
def test_weights_gradients_and_states_are_those_of_an_engine(ranks, ep_size, stage, precision, cache, tmp_path):
    extra = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision]}
    config = tiny_run(cache, model={"ep_size": ep_size}, deepspeed=extra)
    expected = memory_of(config, V, ranks)
    found = run_ranks(ranks, _held, config, folder=tmp_path)
    for part in ("weights", "gradients", "optimizer_states"):
        mean = sum(held[part] for held in found) / ranks
        # Under ZeRO 2 a weight that two partitions share is held whole by both.
        slack = 0.1 if (stage, part) == (2, "gradients") else 0.01
        assert mean == pytest.approx(expected[part], rel=slack), part


def _save(config, folder):
    engine = _build_engine(config, V, dist.get_rank())
    for _ in range(2):
        _step(engine)
        engine.step()
    assert Checkpoints(engine, folder, 1, config.model.ep_size).save(2, 0.0, [], False) is None


def _kept(config):
    """Bytes of everything that autograd keeps of a micro-batch, but for the weights."""
    engine = _build_engine(config, V, 0)
    weights = {weight.untyped_storage().data_ptr() for weight in engine.module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    tokens = torch.randint(0, V, (4, 257))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine(tokens[:, :-1], tokens[:, 1:])
    return sum(size for size, _ in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_those_that_autograd_keeps(precision, cache, tmp_path):
    config = tiny_run(
        cache,
        model={"ep_size": 1, "width": 64, "expert_width": 96, "layers": 3, "moe_every": 2},
        data={"sequence_length": 256},
        ssr={"rule": "carried"},
        deepspeed=PRECISIONS[precision],
    )
    expected = memory_of(config, V, 1)
    # Capacity 1.25 gives 4 experts 640 slots each for 1,024 tokens, top-2. Kept of the logits is their softmax alone.
    passing = 2 * 4 * 640 * 64 * (2 if precision == "bf16" else 4)
    kept = expected["activations"] + expected["dispatch_buffers"] - passing + expected["logits"] // 3
    (found,) = run_ranks(1, _kept, config, folder=tmp_path)
    assert found == pytest.approx(kept, rel=0.05)


def test_recomputation_keeps_each_layer_s_input_and_one_layer(cache):
    def kept(layers, checkpointing):
        model = {"layers": layers, "activation_checkpointing": checkpointing}
        return memory_of(tiny_run(cache, model=model), V, 2)

    one, three = kept(1, "non_reentrant"), kept(3, "non_reentrant")
    assert three["activations"] - one["activations"] == 2 * 4 * 64 * 32 * 4
    assert three["dispatch_buffers"] == one["dispatch_buffers"]
    assert kept(3, "none")["activations"] > 2 * three["activations"]


@pytest.mark.parametrize(
    ("batches", "micro"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, 3),
        ({"train_batch_size": 24}, 12),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 4}, 3),
    ],
)
def test_the_micro_batch_is_deepspeed_s(batches, micro):
    config = DeepSpeedConfig({**batches}, mesh_device=None)
    assert micro_batch_of(batches, config.world_size * 2) == micro
    assert config.train_micro_batch_size_per_gpu == micro * (1 if "train_micro_batch_size_per_gpu" in batches else 2)


CHECKPOINTS = [(stage, precision, ep) for stage in (0, 1, 2) for precision in ("fp32", "bf16") for ep in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision", "ep_size"), CHECKPOINTS)
def test_a_checkpoint_takes_as_much_disk_as_was_said(stage, precision, ep_size, cache, tmp_path):
    extra = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision]}
    config = tiny_run(cache, model={"ep_size": ep_size, "width": 64, "expert_width": 256}, deepspeed=extra)
    run_ranks(2, _save, config, tmp_path / "checkpoints", folder=tmp_path)
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if file.is_file())
    assert checkpoint_bytes(config, V) == pytest.approx(written, rel=0.1)
