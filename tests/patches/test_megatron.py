"""Upstream Megatron-DeepSpeed, run and patched: `SSR_MEGATRON` names a checkout of the commit in the patch's header.

It needs what its own requirements name, of which pybind11, six and a torchvision made for this torch are not among
this project's: put them on the PYTHONPATH. Also a C++ compiler and make, and a DeepSpeed that it can import: at the
latest 0.19.6.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import deepspeed
import pytest

from tests.patches.test_patches import ROOT, apply, contents

CHECKOUT = os.environ.get("SSR_MEGATRON")
LOADS = importlib.util.find_spec("deepspeed.compression") and importlib.util.find_spec("deepspeed.compression.compress")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="SSR_MEGATRON names no checkout of Megatron-DeepSpeed"),
    pytest.mark.skipif(not LOADS, reason=f"Megatron-DeepSpeed cannot import deepspeed {deepspeed.__version__}"),
]

BLOCK = {"rule": "ssr", "probability": 0.5, "entropy": 0.5, "monitor": {"interval": 5, "path": "loads.jsonl"}}
STEPS = 20
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--num-experts 4 --expert-interval 1 --moe-expert-parallel-size 2 --topk 2 --moe-loss-coeff 0 "
    "--create-moe-param-group --no-pipeline-parallel --tokenizer-type NullTokenizer --vocab-size 256"
)
# Kernels that Megatron has for CUDA alone; and at this commit its plain attention runs with a micro-batch of 1 only.
CPU = (
    "--no-gradient-accumulation-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion --no-masked-softmax-fusion "
    "--micro-batch-size 1"
)
TRAINING = (
    f"--global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --log-interval 1 "
    "--eval-interval 100 --eval-iters 1 --data-impl mmap --split 90,5,5"
)
MAKE_DATA = """
import sys, torch
from megatron.data import indexed_dataset
builder = indexed_dataset.make_builder("text.bin", impl="mmap", vocab_size=256)
for part in range(40):
    text = open(sys.argv[1], "rb").read()[part * 400 : (part + 1) * 400]
    builder.add_item(torch.tensor(list(text)))
    builder.end_document()
builder.finalize("text.idx")
"""


def environment(megatron):
    paths = [str(megatron), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # Accelerator devices of a machine, in DeepSpeed's eyes, where the accelerator is the CPU.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "LOCAL_SIZE": "2"}


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory):
    """A copy of the checkout, whose data set builder is compiled in it, with a little text to train on."""
    folder = tmp_path_factory.mktemp("megatron") / "checkout"
    shutil.copytree(CHECKOUT, folder, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    command = [sys.executable, "-c", MAKE_DATA, str(ROOT / "README.md")]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, timeout=300)
    return folder


@pytest.fixture
def patched(unpatched):
    assert apply("megatron-deepspeed", unpatched).returncode == 0
    yield unpatched
    assert apply("megatron-deepspeed", unpatched, "--reverse").returncode == 0


def pretrain(megatron, config, *arguments, launcher=()):
    """Upstream's pretrain_gpt.py on two ranks."""
    (megatron / "ds.json").write_text(
        json.dumps({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, **config})
    )
    (megatron / "loads.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *launcher]
    command += ["pretrain_gpt.py", *f"{MODEL} {CPU} {TRAINING}".split(), "--data-path", "text"]
    command += ["--deepspeed", "--deepspeed_config", "ds.json", *arguments]
    return subprocess.run(
        command, cwd=megatron, env=environment(megatron), capture_output=True, text=True, check=False, timeout=600
    )


def losses_of(result):
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SSR active on 2 routers: language_model.encoder.layers.0.mlp.deepspeed_moe.gate" in result.stderr
    losses = [float(loss) for loss in re.findall(r"lm loss: ([\d.E+-]+)", result.stdout)]
    assert len(losses) == STEPS
    return losses


def reports(megatron):
    """The load records but for their times."""
    records = [json.loads(line) for line in (megatron / "loads.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def test_an_unpatched_megatron_pretrains_with_a_block_and_a_patched_one_alike_from_arguments(unpatched):
    """The same losses and loads, digit for digit."""
    losses = losses_of(pretrain(unpatched, {"ssr": BLOCK}, launcher=("-m", "ssr_deepspeed.run")))
    assert losses[-1] < losses[0] - 1
    loads = reports(unpatched)
    figures = [record for record in loads if record["kind"] == "load"]
    assert [record["step"] for record in figures] == [5, 10, 15, 20]
    shares = [layer["transport_share"] for record in figures for layer in record["layers"].values()]
    assert 0 < sum(shares) < len(shares)

    before = contents(unpatched / "megatron")
    assert apply("megatron-deepspeed", unpatched, "--check").stdout.startswith("megatron-deepspeed would apply")
    assert apply("megatron-deepspeed", unpatched).returncode == 0
    rest = {key: value for key, value in BLOCK.items() if key in ("entropy", "monitor")}
    (unpatched / "block.json").write_text(json.dumps({**rest, "rule": "none"}))
    arguments = ["--ssr-config", "block.json", "--ssr-rule", "ssr", "--ssr-probability", "0.5"]
    assert losses_of(pretrain(unpatched, {}, *arguments)) == losses
    assert reports(unpatched) == loads
    # A patched one needs neither the arguments nor the launcher.
    assert losses_of(pretrain(unpatched, {"ssr": BLOCK})) == losses
    assert apply("megatron-deepspeed", unpatched, "--reverse").returncode == 0
    sources = {path: text for path, text in contents(unpatched / "megatron").items() if path.suffix == ".py"}
    assert sources == {path: text for path, text in before.items() if path.suffix == ".py"}


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ({"ssr": {}}, ["--ssr-rule", "ssr"], "SSR is configured twice"),
        ({}, ["--ssr-config", "nowhere.json"], "--ssr-config nowhere.json: neither a file nor JSON"),
        ({}, ["--ssr-config", "[]"], "--ssr-config []: not a JSON object"),
        ({}, ["--ssr-probability", "often"], "argument --ssr-probability: invalid loads value: 'often'"),
        ({}, ["--ssr-rule", "sr"], "ssr.rule = 'sr'"),
    ],
)
def test_wrong_arguments_of_a_patched_megatron_stop_it_with_a_sentence(patched, config, arguments, words):
    result = pretrain(patched, config, *arguments)
    assert result.returncode != 0
    assert words in result.stderr
