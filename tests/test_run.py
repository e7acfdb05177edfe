import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from deepspeed.runtime.engine import DeepSpeedEngine
print(__name__, sys.argv[1:], hasattr(DeepSpeedEngine.__init__, "__wrapped__"))
import helper
"""


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "ssr_deepspeed.run", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "script.py").write_text(SCRIPT)
    (tmp_path / "code" / "helper.py").write_text("print('helper found')")
    return tmp_path


@pytest.mark.parametrize("launcher", [[], ["--local_rank=1"], ["--local_rank", "1"]])
def test_a_script_runs_as_main_with_ssr_installed_and_its_own_arguments(folder, launcher):
    result = run(*launcher, "code/script.py", "--lr", "1", cwd=folder)
    assert f"__main__ {['--lr', '1', *launcher]} True" in result.stdout, result.stderr
    assert "helper found" in result.stdout


def test_a_module_runs_too(folder):
    result = run("-m", "script", "--lr", "1", cwd=folder / "code")
    assert "__main__ ['--lr', '1'] True" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "usage"), (["nowhere.py"], "no script 'nowhere.py'"), (["--x"], "usage")]
)
def test_a_wrong_call_says_so(folder, arguments, words):
    result = run(*arguments, cwd=Path(folder))
    assert result.returncode != 0
    assert words in result.stderr
