import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from ssr_deepspeed.config import AlertConfig, SSRConfig
from ssr_deepspeed.monitor.alerts import ADVICE
from ssr_deepspeed.monitor.names import METRICS
from tests.gloo import run_ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


def _run_example(code):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names["engine"].ssr.report


def test_the_example_has_twelve_lines_and_runs(tmp_path):
    assert len([line for line in EXAMPLE.splitlines() if line]) == 12
    (report,) = run_ranks(1, _run_example, EXAMPLE, folder=tmp_path)
    assert report["step"] == 10
    assert sum(report["layers"]["deepspeed_moe.gate"]["load"]) == pytest.approx(1, abs=1e-5)


def test_the_block_table_has_every_key_with_its_default():
    table = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE))
    import json

    defaults = SSRConfig().to_dict()
    assert list(table) == [field.name for field in dataclasses.fields(SSRConfig)]
    assert {key: json.loads(text) for key, text in table.items()} == defaults


def test_the_tables_of_metrics_and_alerts_are_those_of_the_code():
    metrics = dict(
        re.findall(r"^\| `(\w+)` \| (.+?) \|$", README.split("| metric | meaning |")[1].split("\n\n")[0], re.MULTILINE)
    )
    assert metrics == METRICS
    alerts = dict(
        re.findall(
            r"^\| `(\w+)` \| (.+?) \|", README.split("| alert | raised when |")[1].split("\n\n")[0], re.MULTILINE
        )
    )
    assert set(alerts) == set(ADVICE)
    for name, value in dataclasses.asdict(AlertConfig()).items():
        row = alerts["dead_expert" if name == "dead_windows" else name]
        assert re.search(rf"\b{re.escape(str(value))}\b", row), name


def test_the_tree_names_what_is_there():
    tree = README.split("```\nssr_deepspeed/\n")[1].split("```")[0]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    for path in tracked:
        top, *rest = path.split("/")
        if top.startswith("."):
            continue
        assert top in tree or top == "ssr_deepspeed", path
        if top == "ssr_deepspeed" and rest[0] not in ("__init__.py", "py.typed"):
            assert re.search(rf"^  {re.escape(rest[0])}/? ", tree, re.MULTILINE), path


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([\w-]+)", README)) <= targets
