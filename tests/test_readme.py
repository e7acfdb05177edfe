import argparse
import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ssr_deepspeed.config import AlertConfig, SSRConfig
from ssr_deepspeed.monitor.alerts import ADVICE
from ssr_deepspeed.monitor.names import METRICS
from ssr_deepspeed.pretrain.__main__ import add_arguments
from ssr_deepspeed.pretrain.config import load_run
from ssr_deepspeed.pretrain.sizes import memory_of, micro_batch_of, sizes_of
from tests.gloo import run_ranks
from tests.launch.runs import environment

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


CONFIGURATIONS = {
    cells[1].strip("`"): cells[2:-1]
    for cells in (
        re.split(r" *\| *", line)
        for line in README.split("| `--config` | `configs/deepspeed/` |")[1].split("\n\n")[0].splitlines()[2:]
    )
}


def test_the_table_of_configurations_has_a_row_for_each_file():
    assert set(CONFIGURATIONS) == {file.stem for file in (ROOT / "configs" / "pretrain").glob("*.json")}
    told = [cells[0] for cells in CONFIGURATIONS.values()]
    for file in (ROOT / "configs" / "deepspeed").glob("*.json"):
        section = json.loads(file.read_text())
        precision = "bf16" if section.get("bf16", {}).get("enabled") else "fp32"
        summary = f"{file.stem}: {precision}, ZeRO {section['zero_optimization']['stage']}"
        assert next(words for words in told if words.startswith(file.stem)).startswith(summary)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_row_of_the_table_of_configurations_is_what_the_file_comes_to(name):
    file, parameters, active, ranks, memory, tokens = CONFIGURATIONS[name]
    config, started = load_run(name, []), int(ranks)
    section = json.loads((ROOT / "configs" / "pretrain" / f"{name}.json").read_text())["deepspeed"]
    assert Path(section[0] if isinstance(section, list) else section).stem == file.partition(":")[0]
    config.check_ranks(started)
    vocabulary = 257 if config.data.tokenizer == "bytes" else config.data.vocabulary
    sizes = sizes_of(config, vocabulary)
    for count, text in ((sizes.parameters, parameters), (sizes.active_parameters, active)):
        assert f"{count / 1e6:,.{len(text.partition('.')[2][:-1])}f}M" == text
    total = config.deepspeed.get("train_batch_size") or micro_batch_of(config.deepspeed, started) * started
    assert f"{total * config.data.sequence_length:,}" == tokens
    for number, said in [(ranks, memory.split()[0]), *re.findall(r"(\d+) ranks: ([\d.]+)", memory)]:
        assert f"{sum(memory_of(config, vocabulary, int(number)).values()) / 2**30:.1f}" == said


def test_the_script_takes_the_commands_for_two_machines_as_they_are_printed():
    block = README.split("**Two machines**")[1].split("```")[1].strip().replace("RUN.json", "tiny_cpu")
    first, second = block.splitlines()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for rank, line in enumerate((first, second)):
        command = [*shlex.split(line), "--dry-run"]
        result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        preflight, training = result.stdout.splitlines()
        for printed, module, port in ((preflight, "preflight", 29401), (training, "pretrain", 29400)):
            start, _, words = printed.partition(f" -m ssr_deepspeed.{module} ")
            assert f"--rdzv-endpoint node0:{port} --rdzv-id first-" in start
            assert f"is_host={1 - rank} " in start
            assert "--nnodes 2 " in start
            assert f"--log-dir logs/node_{rank} " in start
            options = parser.parse_args(shlex.split(words))
            assert (options.config, options.output) == ("tiny_cpu", Path("/shared/run"))


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
