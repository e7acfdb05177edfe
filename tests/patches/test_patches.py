import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from tests.gloo import run_ranks
from tests.toy import WIDTH, build_engine

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "patches"
INSTALLED = Path(deepspeed.__file__).parent


def apply(patch, target, *options):
    command = [str(PATCHES / "apply.sh"), str(patch), str(target), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the installed deepspeed/moe."""
    target = tmp_path / "target"
    shutil.copytree(INSTALLED / "moe", target / "deepspeed" / "moe", ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.mark.parametrize("name", ["deepspeed-moe-gate", "megatron-deepspeed"])
def test_a_patch_says_what_why_and_for_which_upstream_and_has_no_context_lines(name):
    header, _, diff = (PATCHES / f"{name}.patch").read_text().partition("\ndiff --git ")
    for word in ("What: ", "Why: ", "Upstream: https://github.com/deepspeedai/"):
        assert f"\n{word}" in header
    assert re.search(r"\b[0-9a-f]{40}\b", header)
    hunks = re.split(r"^@@ .*\n", diff, flags=re.MULTILINE)[1:]
    lines = [line for hunk in hunks for line in hunk.split("diff --git ")[0].splitlines()]
    assert {line[0] for line in lines} == ({"+"} if name == "megatron-deepspeed" else {"+", "-"})


def test_the_deepspeed_patch_applies_once_and_reverses_byte_for_byte(package):
    before = contents(package / "deepspeed" / "moe")
    for options, words in [
        (["--check"], "would apply to"),
        (["--reverse"], "is not applied to"),
        ([], "applied to"),
        ([], "was already applied to"),
        (["--check"], "is applied to"),
        (["--reverse"], "taken back from"),
    ]:
        result = apply("deepspeed-moe-gate", package, *options)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"deepspeed-moe-gate {words} {package}\n")
        patched = words in ("applied to", "was already applied to", "is applied to")
        assert (contents(package / "deepspeed" / "moe") != before) == patched
    assert not (package / "tests").exists()


def test_a_checkout_gets_the_patch_s_own_test_too_and_loses_it_again(package):
    folder = package / "tests" / "unit" / "v1" / "moe"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    assert apply("deepspeed-moe-gate", package).returncode == 0
    compile((folder / "test_moe_gate.py").read_text(), "test_moe_gate.py", "exec")
    assert apply(PATCHES / "deepspeed-moe-gate.patch", package, "--reverse").returncode == 0
    assert [path.name for path in folder.iterdir()] == ["__init__.py"]


def test_a_repository_around_the_target_changes_nothing(package):
    subprocess.run(["git", "init", "--quiet", str(package.parent)], check=True)
    assert apply("deepspeed-moe-gate", package).returncode == 0
    assert "gate: Optional" in (package / "deepspeed" / "moe" / "layer.py").read_text()


def test_another_version_of_a_file_is_refused_and_stays_as_it_is(package):
    layer = package / "deepspeed" / "moe" / "layer.py"
    layer.write_text("# One line more than the release.\n" + layer.read_text())
    before = contents(package / "deepspeed" / "moe")
    for option in ([], ["--check"], ["--reverse"]):
        result = apply("deepspeed-moe-gate", package, *option)
        assert result.returncode == 1
        assert "deepspeed/moe/layer.py is another version than deepspeed-moe-gate was made for" in result.stderr
        assert "release 0.19.8" in result.stderr
    assert contents(package / "deepspeed" / "moe") == before


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["deepspeed-moe-gate", "."], 1, "there is no deepspeed/moe/layer.py in"),
        (["megatron-deepspeed", "."], 1, "there is no megatron/arguments.py in"),
        (["deepspeed-moe-gate", "nowhere"], 2, "there is no folder nowhere"),
        (["no-such-patch", "."], 2, "there is no patch no-such-patch"),
        (["deepspeed-moe-gate", ".", "--force"], 2, "there is no option --force"),
        (["deepspeed-moe-gate"], 2, "usage: apply.sh PATCH TARGET"),
    ],
)
def test_a_wrong_target_or_call_is_one_sentence(arguments, status, words, tmp_path):
    command = [str(PATCHES / "apply.sh"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert words in result.stderr


# Every process that starts with this imports deepspeed.moe from the patched copy, and the rest of the package from
# where it is installed: a whole copy would have DeepSpeed compile its operators anew.
REDIRECTION = """
import importlib.util
import sys

class Redirection:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "deepspeed.moe":
            init = FOLDER + "/__init__.py"
            return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[FOLDER])

sys.meta_path.insert(0, Redirection)
"""


def _train(gate):
    """Five steps of a patched `MoE` on two expert-parallel ranks: its gate, the layer's file and the losses."""
    expert = torch.nn.Sequential(torch.nn.Linear(WIDTH, 32), torch.nn.GELU(), torch.nn.Linear(32, WIDTH))
    model = MoE(WIDTH, expert, num_experts=4, ep_size=2, k=2, capacity_factor=1.5, gate=gate)
    engine = build_engine(model, None)
    gate = model.deepspeed_moe.gate
    assert type(gate) is SSRGate
    assert engine.gate_modules == [gate]
    assert (gate.k, gate.capacity_factor, gate.wg.weight.shape) == (2, 1.5, (4, WIDTH))
    first, losses = gate.wg.weight.detach().clone(), []
    x, target = torch.randn(2, 1, 64, WIDTH)
    for _ in range(5):
        output, l_aux, _ = engine(x)
        loss = (output - target).square().mean() + l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert not torch.equal(gate.wg.weight, first)
    return gate, sys.modules[MoE.__module__].__file__, losses


def _train_both():
    by_class, *results = _train(SSRGate)
    assert by_class.ssr.config == SSRConfig()
    config = SSRConfig(rule="ssr", probability=1.0)
    by_factory, *others = _train(functools.partial(SSRGate, config=config))
    assert by_factory.ssr.config == config
    assert by_factory.ssr.solution is not None
    return results, others


def train_patched(folder):
    """For a process with the redirection."""
    for results in run_ranks(2, _train_both, folder=Path(folder)):
        for file, losses in results:
            assert file == str(Path(folder) / "target" / "deepspeed" / "moe" / "layer.py")
            assert losses[-1] < losses[0], losses


def test_a_patched_moe_layer_trains_with_our_gate_as_a_class_and_from_a_factory(package, tmp_path):
    assert apply("deepspeed-moe-gate", package).returncode == 0
    redirection = f"FOLDER = {str(package / 'deepspeed' / 'moe')!r}\n{REDIRECTION}"
    (tmp_path / "sitecustomize.py").write_text(redirection)
    paths = [str(tmp_path), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = f"from tests.patches.test_patches import train_patched; train_patched({str(tmp_path)!r})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
