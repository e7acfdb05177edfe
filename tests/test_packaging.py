import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SMOKE = """
import pathlib, torch, ssr_deepspeed
assert pathlib.Path(ssr_deepspeed.__file__).is_relative_to({home!r}), ssr_deepspeed.__file__
from ssr_deepspeed.pretrain.config import load_run
assert load_run("tiny_cpu", []).model.experts == 8
gate = ssr_deepspeed.SSRGate(16, 4, 2, config=ssr_deepspeed.SSRConfig(probability=1.0))
assert int(gate(torch.randn(32, 16), None, True)[-1].sum()) == 64
ssr_deepspeed.install(), ssr_deepspeed.uninstall()
print("smoke test passed")
"""


def build_wheel(folder):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def smoke(python, home):
    """Run the smoke test with an interpreter whose package must come from `home`, away from the checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", SMOKE.format(home=str(home))],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "smoke test passed" in result.stdout, result.stderr


def test_a_wheel_holds_the_package_and_its_configurations_and_nothing_else(tmp_path):
    names = zipfile.ZipFile(build_wheel(tmp_path)).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top.split("-")[0] for top in tops} == {"ssr_deepspeed"}
    files = (path for path in (ROOT / "ssr_deepspeed").rglob("*") if path.suffix in (".py", ".html", ".css", ".js"))
    package = {path.relative_to(ROOT).as_posix() for path in files}
    assert package <= set(names)
    shipped = {name.split("/configs/")[1] for name in names if "/configs/" in name}
    assert shipped == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.json")}


def test_a_wheel_in_an_environment_without_the_checkout_passes_a_smoke_test(tmp_path):
    """A fresh environment that borrows this one's dependencies, so that nothing is downloaded."""
    wheel = build_wheel(tmp_path)
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    (site,) = (home / "lib").glob("python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)],
        check=True,
    )
    import torch

    # Behind the environment's own packages, and without following .pth files to the checkout.
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    smoke(str(python), home)
    help_text = subprocess.run(
        [home / "bin" / "ssr-pretrain", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--config" in help_text
    records = tmp_path / "load.jsonl"
    records.write_text('{"kind":"load","step":1,"steps":1,"model":{},"layers":{}}\n')
    subprocess.run([home / "bin" / "ssr-monitor", "report", records], check=True)
    assert "</html>" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_wheel_and_its_declared_dependencies_make_an_environment_that_works(tmp_path):
    wheel = build_wheel(tmp_path)
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = str(home / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*install, "torch"], check=True)
    subprocess.run([*install, str(wheel)], check=True)
    smoke(python, home)
