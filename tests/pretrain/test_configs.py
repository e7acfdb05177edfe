"""The configurations that come with the package, the large ones built on torch's meta device."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig

from ssr_deepspeed.pretrain.config import RunConfig, load_run
from ssr_deepspeed.pretrain.deepspeed_json import check_batch, check_deepspeed
from ssr_deepspeed.pretrain.sizes import memory_of, micro_batch_of, sizes_of
from ssr_deepspeed.pretrain.train import _build_engine
from tests.gloo import run_ranks
from tests.pretrain.tiny import tiny_run

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("pretrain/*.json"))

# Of each run: millions of parameters, of active ones, ranks, GiB a rank, tokens a step; the README's table.
TABLE = {
    "tiny_cpu": (1.7, 0.6, 2, 0.12, 4_096),
    "wikitext103_s": (6.8, 4.7, 1, 9.9, 24_576),
    "wikitext103_m": (50.2, 19.0, 1, 13.3, 24_576),
    "wikitext103_l": (180.5, 48.3, 1, 21.5, 24_576),
    "enwik8_s": (21.8, 4.3, 1, 3.1, 24_576),
    "enwik8_m": (51.7, 10.1, 1, 5.5, 24_576),
    "moe_1b_eight_gpus": (1_292.3, 235.3, 8, 19.8, 1_048_576),
    "olmoe_7b_many_nodes": (6_919.1, 1_282.0, 64, 12.4, 4_194_304),
}


def shipped(name):
    config = load_run(name, [])
    return config, 257 if config.data.tokenizer == "bytes" else config.data.vocabulary


@pytest.mark.parametrize("name", [file.stem for file in RUNS])
def test_every_run_has_the_size_that_the_table_says(name):
    config, vocabulary = shipped(name)
    assert config == load_run(str(CONFIGS / "pretrain" / f"{name}.json"), [])
    parameters, active, ranks, memory, tokens = TABLE[name]
    check_batch(config.deepspeed, ranks)
    assert ranks % config.model.ep_size == 0
    sizes, needed = sizes_of(config, vocabulary), memory_of(config, vocabulary, ranks)
    assert sizes.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
    assert sizes.active_parameters / 1e6 == pytest.approx(active, abs=0.05)
    assert sum(needed.values()) / 2**30 == pytest.approx(memory, rel=0.05)
    total = config.deepspeed.get("train_batch_size") or micro_batch_of(config.deepspeed, ranks) * ranks
    assert total * config.data.sequence_length == tokens


@pytest.mark.parametrize("name", [name for name, (_, _, ranks, *_) in TABLE.items() if ranks > 8])
def test_a_run_for_several_machines_says_for_how_many_ranks(name):
    """DeepSpeed's launcher would train it on one machine where it finds no hostfile."""
    ranks = TABLE[name][2]
    shipped(name)[0].check_ranks(ranks)
    with pytest.raises(ValueError, match=f"ranks = {ranks}, but 8 started: .* or say --set ranks=8"):
        shipped(name)[0].check_ranks(8)
    load_run(name, ["ranks=8"]).check_ranks(8)


@pytest.mark.parametrize(
    ("name", "layers", "width", "block", "dropout", "steps", "warmup"),
    [
        ("wikitext103_s", 3, 128, 256, 0.7, 60_000, 3_000),
        ("wikitext103_m", 6, 352, 512, 0.1, 80_000, 4_000),
        ("wikitext103_l", 12, 512, 1024, 0.1, 80_000, 5_000),
        ("enwik8_s", 6, 264, 512, 0.1, 60_000, 3_000),
        ("enwik8_m", 8, 352, 512, 0.1, 80_000, 4_000),
    ],
)
def test_the_published_settings_are_kept(name, layers, width, block, dropout, steps, warmup):
    """Those of the language models of MomentumSMoE and CompeteSMoE."""
    config, _ = shipped(name)
    model, schedule = config.model, config.deepspeed["scheduler"]
    assert (model.layers, model.width, model.expert_width, model.dropout) == (layers, width, width, dropout)
    assert (model.experts, model.top_k, config.data.sequence_length, config.steps) == (16, 2, block, steps)
    assert schedule["type"] == "WarmupLR"
    assert schedule["params"]["warmup_num_steps"] == warmup
    assert schedule["params"]["warmup_max_lr"] == config.deepspeed["optimizer"]["params"]["lr"] == 7e-4


def test_the_seven_billions_are_those_of_the_published_model():
    """OLMoE-1B-7B (Muennighoff et al., arXiv 2409.02060, table 1): 6.9 billion parameters, 1.3 active."""
    sizes = sizes_of(load_run("olmoe_7b_many_nodes", []), 50_304)
    assert round(sizes.parameters / 1e9, 1) == 6.9
    assert round(sizes.active_parameters / 1e9, 1) == 1.3
    layer = 4 * 2048**2 + 2048 * 64 + 2 * 2048 + 64 * 3 * 2048 * 1024
    assert sizes.parameters == 16 * layer + 2 * 50_304 * 2048 + 2048


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("deepspeed/*.json")), ids=lambda file: file.stem)
def test_every_deepspeed_file_is_one_that_deepspeed_accepts(file):
    section = json.loads(file.read_text())
    check_deepspeed(section)
    config = DeepSpeedConfig(section)
    assert config.zero_optimization_stage == section["zero_optimization"]["stage"]
    assert config.optimizer_name == "adamw"
    assert config.bfloat16_config.enabled == (file.stem != "cpu")


def test_every_model_and_deepspeed_file_belongs_to_a_run():
    texts = "".join(file.read_text() for file in RUNS)
    for file in [*CONFIGS.glob("deepspeed/*.json"), *CONFIGS.glob("model/*.json")]:
        assert f'"../{file.parent.name}/{file.name}"' in texts


def _train(cache, file):
    """A small model under a shipped DeepSpeed file, two optimizer steps of two micro-batches each."""
    section = json.loads(file.read_text())
    section |= {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    section["scheduler"]["params"]["warmup_num_steps"] = 2
    checkpointing = "deepspeed" if "activation_checkpointing" in section else "none"
    settings = tiny_run(cache, model={"activation_checkpointing": checkpointing}).to_dict()
    engine = _build_engine(RunConfig.from_dict({**settings, "deepspeed": section}, ""), 257, dist.get_rank())
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(0, 257, (4, 65))
    losses = []
    for _ in range(8):
        output = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(output.loss)
        engine.step()
        losses.append(output.loss.item())
    assert engine.global_steps == 4
    return losses[0] - losses[-1]


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(CONFIGS.glob("deepspeed/*.json")), ids=lambda file: file.stem)
def test_a_model_trains_under_every_deepspeed_file(file, cache, tmp_path):
    gained = run_ranks(2, _train, cache, file, folder=tmp_path)
    assert min(gained) > 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("zero_optimisation.stage=1", r"unknown key deepspeed.zero_optimisation .*did you mean 'zero_optimization'"),
        ("gradient_clip=1.0", r"deepspeed.gradient_clip = 1.0; did you mean 'gradient_clipping'.*would ignore it"),
        ("zero_optimization.stag=1", r"deepspeed.zero_optimization.stag = 1; did you mean 'stage'"),
        ("zero_optimization.offload_optimizer.devise=1", r"offload_optimizer.devise = 1; did you mean 'device'"),
        ("bf16.enable=true", r"unknown key deepspeed.bf16.enable = True; did you mean 'enabled'"),
        ("tensorboard.enable=true", r"unknown key deepspeed.tensorboard.enable = True; did you mean 'enabled'"),
        ("zero_optimization.stage=3", r"deepspeed.zero_optimization.stage = 3; allowed: 0, 1, 2"),
        ("zero_optimization.stage=7", r"deepspeed.zero_optimization.stage = 7: Input should be"),
        ("optimizer.parms={}", r"deepspeed.optimizer.parms = {}; did you mean 'params'"),
        ("optimizer.type=AdamX", r"deepspeed.optimizer.type = 'AdamX'; allowed: .*; did you mean 'adam"),
        ("optimizer={}", r"deepspeed.optimizer = {} lacks a type: DeepSpeed would ignore it"),
        ('scheduler={"params": {}}', r"deepspeed.scheduler = {'params': {}} lacks a type"),
        ("optimizer.params.rate=1", r"unknown key deepspeed.optimizer.params.rate = 1; .*'lr'"),
        ("scheduler.type=WarmUpLR", r"scheduler.type = 'WarmUpLR'; allowed: .* did you mean 'WarmupLR'"),
        ("scheduler.params.warmup_steps=1", r"warmup_steps = 1; did you mean 'warmup_num_steps'"),
        ("activation_checkpointing.partition=true", r"partition = True; did you mean 'partition_activations'"),
        ("data_types.grad_dtype=fp32", r"deepspeed.data_types.grad_dtype = 'fp32'; did you mean"),
        ("train_batch_size=0", r"deepspeed.train_batch_size = 0; allowed: whole numbers from 1"),
    ],
)
def test_what_deepspeed_would_ignore_or_refuse_late_is_refused_at_once(override, words):
    with pytest.raises(ValueError, match=words):
        load_run("tiny_cpu", [f"deepspeed.{override}"])


def test_what_deepspeed_knows_is_accepted():
    """Keys of its documentation, in every section that is read by name and in some that are not."""
    check_deepspeed(
        {
            **tiny_run("cache").deepspeed,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}, "legacy_fusion": False},
            "scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 10}},
            "checkpoint": {
                "tag_validation": "Warn",
                "load_universal": False,
                "use_node_local_storage": False,
                "parallel_write": {"pipeline_stage": False},
            },
            "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1},
            "activation_checkpointing": {"number_checkpoints": 4, "synchronize_checkpoint_boundary": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "tensorboard": {"enabled": False, "output_path": "logs"},
            "comms_logger": {"enabled": False},
            "aio": {"block_size": 2**20},
            "fp16": {"enabled": False, "loss_scale": 0},
            **dict.fromkeys(("wall_clock_breakdown", "prescale_gradients", "dump_state", "memory_breakdown"), False),
            **dict.fromkeys(("steps_per_print", "gradient_predivide_factor"), 10),
            "communication_data_type": "fp32",
            "seq_parallel_communication_data_type": "fp32",
        }
    )


def test_two_precisions_at_once_are_refused():
    with pytest.raises(ValueError, match="deepspeed: bfloat16 and fp16 modes cannot be simultaneously enabled"):
        load_run("tiny_cpu", ["deepspeed.bf16.enabled=true", "deepspeed.fp16.enabled=true"])


@pytest.mark.parametrize(
    ("sizes", "ranks", "words"),
    [
        ({"train_batch_size": 96}, 7, "train_batch_size = 96 is no multiple of 7 ranks = 7"),
        ({"train_batch_size": 96, "train_micro_batch_size_per_gpu": 5}, 8, "of 8 ranks times train_micro.* = 5 = 40"),
        (
            {"train_batch_size": 96, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
            8,
            "train_batch_size = 96 is not 8 ranks times .* = 48",
        ),
    ],
)
def test_batch_sizes_that_do_not_fit_the_ranks_are_refused(sizes, ranks, words):
    with pytest.raises(ValueError, match=words):
        check_batch(sizes, ranks)
    check_batch({"train_micro_batch_size_per_gpu": 5}, ranks)


def test_a_run_without_batch_sizes_says_so(tmp_path):
    settings = json.loads((CONFIGS / "pretrain" / "tiny_cpu.json").read_text())
    settings |= {"model": str(CONFIGS / "model" / "tiny.json"), "deepspeed": {"ssr": {}}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="deepspeed lacks a batch size"):
        load_run(str(tmp_path / "run.json"), [])


def test_later_parts_of_a_section_override_earlier_ones(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps(tiny_run(str(tmp_path)).deepspeed))
    settings = tiny_run(str(tmp_path)).to_dict()
    settings["deepspeed"] = ["base.json", {"optimizer": {"params": {"lr": 1.0}}}, {"ssr": {"seed": 3}}]
    (tmp_path / "run.json").write_text(json.dumps(settings))
    section = load_run(str(tmp_path / "run.json"), []).deepspeed
    assert section["optimizer"]["params"] == {"lr": 1.0, "weight_decay": 0.1, "torch_adam": True}
    assert section["ssr"]["rule"] == "ssr"
    settings["deepspeed"] = ["base.json", 5]
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="deepspeed contains 5; allowed: a file's path"):
        load_run(str(tmp_path / "run.json"), [])
