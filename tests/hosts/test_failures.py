"""What a user is told where SSR or its host cannot go on: what, where, and what to do, on every rank alike."""

import contextlib
import io
import logging

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger

import ssr_deepspeed
from ssr_deepspeed.versions import LOWEST, SYMBOLS, TESTED, beyond_tested, check_host
from tests.gloo import run_ranks
from tests.test_architecture import MODULES, imports_from
from tests.toy import WIDTH, ToyModel, build_engine

MISSPELT = ("SSR", "srr", "ssr_config", "selective_sinkhorn")


def _said(action):
    """Sentences of an action on stderr, and DeepSpeed's own warnings."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(text):
            action()
    finally:
        logger.removeHandler(handler)
    return text.getvalue()


def _message(kinds, action):
    with pytest.raises(kinds) as error:
        action()
    return str(error.value)


@contextlib.contextmanager
def _without(owner, name):
    kept = getattr(owner, name)
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@contextlib.contextmanager
def _of_version(version):
    kept = deepspeed.__version__
    deepspeed.__version__ = version
    try:
        yield
    finally:
        deepspeed.__version__ = kept


def _refusals():
    rank, said = dist.get_rank(), {}
    with _of_version("0.14.5"):
        said["old"] = _message(RuntimeError, lambda: ssr_deepspeed.install())
    with _without(sharded_moe, "TopKGate"):
        said["symbol"] = _message(ImportError, lambda: ssr_deepspeed.install())
        assert _message(ImportError, lambda: ssr_deepspeed.SSRGate) == said["symbol"]
    with _without(DeepSpeedEngine, "_take_model_step"):
        said["method"] = _message(RuntimeError, lambda: ssr_deepspeed.install())
        assert not hasattr(DeepSpeedEngine.__init__, "__wrapped__"), "nothing is installed by half"
    with _of_version("0.99.1"):
        newer = _said(ssr_deepspeed.install)
    for key in MISSPELT:
        said[key] = _message(ValueError, lambda key=key: build_engine(ToyModel(2, rank), None, **{key: {}}))
    said["zero3"] = _message(AssertionError, lambda: build_engine(ToyModel(2, rank), {}, zero=3))
    said["experts"] = _message(AssertionError, lambda: MoE(WIDTH, torch.nn.Linear(WIDTH, WIDTH), 3, ep_size=2))

    def train():
        engine = build_engine(ToyModel(2, rank, use_tutel=True), {})
        engine.backward(engine(torch.randn(1, 8, WIDTH)).sum())
        engine.step()

    said["tutel"] = _said(train)
    return said, newer


def test_every_rank_is_told_what_its_deepspeed_or_its_configuration_lacks(tmp_path):
    (said, newer), (other, silent) = run_ranks(2, _refusals, folder=tmp_path)
    tutel, _ = said.pop("tutel"), other.pop("tutel")
    assert said == other
    assert "deepspeed 0.14.5 is too old for ssr_deepspeed: install deepspeed>=0.15" in said["old"]
    assert "has no deepspeed.moe.sharded_moe.TopKGate: ssr_deepspeed was tested with" in said["symbol"]
    assert "has no deepspeed.runtime.engine.DeepSpeedEngine._take_model_step" in said["method"]
    assert newer == f"SSR {beyond_tested('0.99.1')}\n"
    assert silent == ""
    for key in MISSPELT:
        assert f'unknown top-level key "{key}"' in said[key]
        assert 'did you mean "ssr"' in said[key]
    # DeepSpeed's own words, which come before SSR can act.
    assert "not supported with" in said["zero3"]
    assert "tage 3" in said["zero3"]
    assert "Number of experts (3) should be divisible by expert parallel size (2)" in said["experts"]
    assert "Tutel optimization requested but not installed" in tutel
    assert "SSR active on 2 routers" in tutel


def test_the_range_of_versions_is_one_that_was_tested():
    for version in TESTED:
        check_host(version)
        assert beyond_tested(version) is None
    assert TESTED[0].startswith(LOWEST)
    assert beyond_tested("0.19.8+cpu") is None
    assert f"{TESTED[0]} to {TESTED[-1]}" in beyond_tested("0.20.0")


def test_what_is_imported_of_deepspeed_is_looked_for_beforehand():
    imported = {
        (module, name)
        for file in MODULES
        if not {"pretrain", "preflight"} & set(file.parts)
        for module, name in imports_from(file)
        if module.startswith("deepspeed.")
    }
    assert imported == {(module, name) for module, names in SYMBOLS.items() for name in names}


class _After(torch.nn.Module):
    """DeepSpeed's own MoE layer between a transformers model's last layer and its head."""

    def __init__(self, head):
        super().__init__()
        self.moe, self.head = MoE(32, torch.nn.Linear(32, 32), 4, ep_size=dist.get_world_size(), k=2), head

    def forward(self, hidden):
        return self.head(hidden + self.moe(hidden)[0])


def _both_hosts():
    from tests.hosts.families import tiny_model

    ssr_deepspeed.install()

    def build(**changes):
        model = tiny_model("mixtral", **changes)
        model.lm_head = _After(model.lm_head)
        return deepspeed.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
                "zero_optimization": {"stage": 1},
                "expert_parallel": {"enabled": True, "autoep_size": 2},
                "ssr": {"monitor": {"interval": 4}},
            },
        )[0]

    built = []
    said = _said(lambda: built.append(build()))
    (engine,) = built
    losses = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(3, 64, (2, 16), generator=generator)
        loss = torch.nn.functional.cross_entropy(engine(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    states = {name: gate.ssr.rule.state["potentials"].tolist() for name, gate in engine.ssr.gates.items()}
    refused = _message((ValueError, AssertionError, RuntimeError), lambda: build(num_local_experts=7))
    return said, losses, states, engine.ssr.report["layers"], refused


def test_autoep_and_deepspeeds_own_moe_in_one_model_are_both_served_and_named(tmp_path):
    pytest.importorskip("deepspeed.moe.ep_router", reason="AutoEP came with deepspeed 0.19.2")
    from tests.hosts.families import skip_where_autoep_crashes

    skip_where_autoep_crashes("mixtral")
    first, second = run_ranks(2, _both_hosts, folder=tmp_path)
    said, losses, states, layers, refused = first
    line = next(line for line in said.splitlines() if line.startswith("SSR active on 3 routers"))
    assert set(states) == set(layers) == set(line.partition(": ")[2].split(", "))
    assert sum("deepspeed_moe.gate" in name for name in states) == 1
    assert losses[-1] < losses[0]
    assert states == second[2]
    assert all(any(potentials) for potentials in states.values())
    assert refused == second[4]
    assert "num_experts" in refused
    assert "7" in refused
