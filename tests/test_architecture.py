"""Promises about the code's structure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ssr_deepspeed"

# A module may import from its own layer's package and from layers above it in this list.
LAYERS = [
    ["kernels", "section", "versions"],
    ["config", "ot", "files"],
    ["collectives"],
    ["routing"],
    ["router"],
    ["gate", "token_router", "monitor"],
    ["hosts"],
    ["autoload", "pretrain", "run"],
    ["preflight"],
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(dotted):
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else None


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module


def imports_from(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        assert not [name for name in imports_of(file) if name.startswith("ssr_deepspeed")]
        return
    for name in imports_of(file):
        other = layer_of(name) if name.startswith("ssr_deepspeed") else None
        if other and other != own:
            assert DEPTH[other] < DEPTH[own], f"{own} imports {other}"


def test_the_solvers_know_torch_alone():
    for file in (PACKAGE / "ot").glob("*.py"):
        for name in imports_of(file):
            assert name.split(".")[0] in {
                "__future__",
                "collections",
                "dataclasses",
                "functools",
                "math",
                "torch",
                "typing",
                "ssr_deepspeed",
            }
            assert "distributed" not in name


@pytest.mark.parametrize("host", ["deepspeed", "torch"])
def test_importing_the_package_loads_no_host(host):
    code = f"import sys, ssr_deepspeed; assert {host!r} not in sys.modules; print(ssr_deepspeed.SSRConfig.__name__)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "SSRConfig\n"
    )


def test_every_public_name_is_there():
    import ssr_deepspeed

    for name in ssr_deepspeed.__all__:
        assert getattr(ssr_deepspeed, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'instal'"):
        ssr_deepspeed.instal  # noqa: B018


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(file):
    text = file.read_text()
    assert text.count("\n") <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = (ast.get_docstring(node) or "").count("\n")
            assert node.end_lineno - node.lineno - documentation <= 55, f"{file}: {node.name}"
