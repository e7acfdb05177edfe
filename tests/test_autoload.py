"""The environment variable that installs SSR without a line of code."""

import os
import subprocess
import sys

import pytest

LOOK = """
import sys, torch
from importlib.metadata import entry_points
assert "ssr_deepspeed" in {entry.name for entry in entry_points(group="torch.backends")}
assert "deepspeed" not in sys.modules and "ssr_deepspeed.config" not in sys.modules
from deepspeed.runtime.engine import DeepSpeedEngine
print(DeepSpeedEngine.__init__.__module__, hasattr(DeepSpeedEngine.forward, "__wrapped__"))
"""
TRAIN = """
import deepspeed, torch
from deepspeed import initialize
from deepspeed.moe.layer import MoE
deepspeed.init_distributed("gloo")
config = {"train_micro_batch_size_per_gpu": 1, "ssr": {},
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
for number in range(2):
    engine, *_ = initialize(model=MoE(16, torch.nn.Linear(16, 16), num_experts=4, k=2), config=config)
    print([type(module).__name__ for module in engine.modules() if "Gate" in type(module).__name__])
engine.backward(engine(torch.randn(1, 32, 16))[0].sum())
engine.step()
torch.distributed.destroy_process_group()
"""


def run(code, asked, *arguments):
    environment = {**os.environ, "SSR_DEEPSPEED_AUTOLOAD": asked}
    return subprocess.run(
        [sys.executable, *arguments, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("asked", ["0", ""])
def test_nothing_happens_without_the_variable(asked):
    result = run(LOOK, asked)
    assert result.returncode == 0, result.stderr
    assert "ssr_deepspeed" not in result.stdout
    assert "False" in result.stdout
    assert "SSR" not in result.stderr


def test_with_it_importing_torch_loads_nothing_and_the_first_engine_installs():
    result = run(LOOK, "1", "-X", "importtime")
    assert "ssr_deepspeed.autoload False" in result.stdout
    assert "ssr_deepspeed.hosts" not in result.stderr


def test_a_wrong_value_says_so_and_breaks_nothing():
    result = run("import torch; print(torch.ones(1))", "yes")
    assert result.returncode == 0
    assert "SSR_DEEPSPEED_AUTOLOAD='yes' is ignored; allowed: 0 and 1" in result.stderr


ANOTHER_PLUGIN = """
from deepspeed.runtime.engine import DeepSpeedEngine
def wrap(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        print("another plugin saw an engine")
    return __init__
DeepSpeedEngine.__init__ = wrap(DeepSpeedEngine.__init__)
"""


INSTALLED = pytest.param("import ssr_deepspeed; ssr_deepspeed.install()", marks=pytest.mark.slow)


@pytest.mark.parametrize("before", ["", INSTALLED, ANOTHER_PLUGIN])
def test_engines_of_a_script_obey_their_block_whatever_else_is_installed(tmp_path, before):
    script = tmp_path / "train.py"
    script.write_text(before + TRAIN)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "SSR_DEEPSPEED_AUTOLOAD": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("['SSRGate']") == 2
    assert result.stdout.count("another plugin saw an engine") == (2 if before == ANOTHER_PLUGIN else 0)
