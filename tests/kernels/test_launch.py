import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.gate import SSRGate
from ssr_deepspeed.kernels import launch, usable
from ssr_deepspeed.routing import make_rule

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ssr_deepspeed.kernels import programs
from ssr_deepspeed.kernels.launch import tiling

tiles = tiling(10**6, {experts})
sizes = dict(E={experts}, ROWS=tiles.rows, COLUMNS=tiles.columns)
targets = [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]
types = dict.fromkeys(["scores_TE", "potentials_E", "mass_TK", "log_mass_TK", "gradient_TK", "scores_gradient_TE",
                       "potentials_gradient_PE", "scaled_TE", "potential_E", "weight_T"], "*fp32")
types |= dict(used_T="*u8", experts_TK="*i64", demand_E="*i64", columns_PE="*fp64", tokens="i32")
types |= dict(inverse_entropy="fp32")
for program, constants in [
    (programs.route_program, dict(K={k}, CHOICES=2)),
    (programs.route_backward_program, dict(K={k}) if {k} == 1 else dict(K={k}, scores_TE=None)),
    (programs.columns_program, dict()),
]:
    constants = sizes | constants
    signature = {{name: "constexpr" if name in constants else types[name] for name in program.arg_names}}
    for target in targets:
        triton.compile(ASTSource(program, signature, constants), target=target)
print("compiled")
"""


def run(code, **environment):
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from ssr_deepspeed.kernels import launch; print(launch.TRITON)"
    assert run(code) == "False\n"


def test_importing_the_package_imports_no_triton():
    assert run("import sys, ssr_deepspeed.kernels; print('triton' in sys.modules)") == "False\n"


@pytest.mark.parametrize(("experts", "k"), [(64, 2), (5, 1)])
def test_the_kernels_compile_for_gpus(tmp_path, experts, k):
    """What the interpreter takes, the compiler may refuse; no GPU is needed to ask it."""
    pytest.importorskip("triton")
    code = COMPILE.format(experts=experts, k=k)
    assert run(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"


class BrokenDriver:
    """Triton's driver where there is no C compiler."""

    asked = 0

    @property
    def active(self):
        self.asked += 1
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nor otherwise")


@pytest.fixture
def broken_driver(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    driver = BrokenDriver()
    monkeypatch.setattr(runtime, "driver", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "_answers", None)
    return driver


def test_without_a_c_compiler_the_kernels_are_left_out_and_one_line_says_why(broken_driver, capsys):
    with FakeTensorMode():
        scores = torch.empty(10, 8, device="cuda")
        assert [usable(scores, 8, 2) for _ in range(3)] == [False] * 3
    assert broken_driver.asked == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Failed to find C compiler" in said and "install a C compiler (gcc)" in said


@pytest.mark.parametrize("answers", [None, True, False])
def test_a_traced_function_takes_the_answer_there_is(monkeypatch, answers):
    monkeypatch.setattr(launch, "_answers", answers)
    monkeypatch.setattr(launch, "_ask_driver", None)

    def scaled(x):
        return x if launch.launchable() is False else x * 2

    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 1.0 if answers is False else 2.0))


def test_a_router_on_a_device_asks_when_it_is_set_up(broken_driver):
    with FakeTensorMode():
        gate = SSRGate(16, 8, config=SSRConfig(rule="ssr"))
        assert not broken_driver.asked, "on the CPU"
        gate.ssr.rule = make_rule(gate.ssr.config, 8, 16, 1, torch.device("cuda"))
    assert broken_driver.asked == 1


def test_nobody_asks_for_a_driver_on_the_cpu(broken_driver):
    assert not usable(torch.empty(10, 8), 8, 2)
    assert not broken_driver.asked


def test_the_kernels_apply_to_fp32_scores_on_a_gpu_within_their_limits(monkeypatch):
    monkeypatch.setattr(launch, "TRITON", True)
    with FakeTensorMode():
        scores = torch.empty(10, 1024, device="cuda")
    assert usable(scores, 1024, 16) and usable(scores, 1) and usable(scores, 8, 8)
    assert not usable(scores, 1025, 2) and not usable(scores, 1024, 17) and not usable(scores, 4, 5)
    assert not usable(scores, 4, 0)
    assert not usable(scores.double(), 8, 2) and not usable(scores.bfloat16(), 8, 2)
    assert not usable(torch.empty(10, 8), 8, 2)
    monkeypatch.setattr(launch, "TRITON", False)
    assert not usable(scores, 8, 2)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (8192, 3), (8192, 64), (10**7, 64), (65536, 1024), (0, 8)])
def test_a_tiling_covers_all_experts_with_few_partial_sums(tokens, experts):
    tiles = launch.tiling(tokens, experts)
    assert tiles.columns >= experts and tiles.columns & (tiles.columns - 1) == 0
    assert tiles.rows * tiles.columns <= launch.TILE and tiles.rows & (tiles.rows - 1) == 0
    assert tiles.programs <= launch.PROGRAMS and tiles.programs * tiles.columns <= launch.PARTIALS
    assert tiles.programs * tiles.rows < tokens + tiles.rows
