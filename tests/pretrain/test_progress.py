"""What the records say of the machine, recomputed from what it did."""

import contextlib
import io
import os
import pty
import re
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssr_deepspeed.monitor.sinks import read_json_lines
from ssr_deepspeed.pretrain import data, devices, prepare, train
from ssr_deepspeed.pretrain.devices import GateTimer, peak_of
from ssr_deepspeed.pretrain.sizes import sizes_of
from ssr_deepspeed.pretrain.train import _build_engine
from tests.gloo import run_ranks
from tests.pretrain.tiny import tiny_run

# Seconds that a slow source takes for a batch; far above those of a step.
DELAY = 0.3


def _slow(config, folder):
    """A run whose rank 1 waits for its data from step 3 on."""
    batches_of = data.training_batches

    def slow_batches(*arguments, **options):
        for number, batch in enumerate(batches_of(*arguments, **options)):
            if number >= 4 and dist.get_rank() == 1:
                time.sleep(DELAY)
            yield batch

    data.training_batches = slow_batches
    run = train.Run(config, Path(folder))
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run.train()
    return time.monotonic() - began, said.getvalue()


def test_figures_of_throughput_agree_with_one_another_and_a_slow_source_shows(cache, tmp_path):
    config = tiny_run(cache, steps=5, log_every=2, peak_flops=1e12)
    (whole, said), (_, nothing) = run_ranks(2, _slow, config, str(tmp_path / "run"), folder=tmp_path)
    records = [r for r in read_json_lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [record["step"] for record in records] == [2, 4, 5]
    tokens_before, seconds_before = 0, 0.0
    for record in records:
        tokens, seconds = record["tokens"] - tokens_before, record["seconds"] - seconds_before
        tokens_before, seconds_before = record["tokens"], record["seconds"]
        assert record["tokens"] == record["step"] * 2 * 2 * 4 * 64
        assert record["tokens_per_second"] * seconds == pytest.approx(tokens, rel=0.02)
        assert record["tokens_per_second_per_device"] == pytest.approx(record["tokens_per_second"] / 2, abs=0.1)
        assert record["step_seconds"] * tokens / 1024 == pytest.approx(seconds, abs=2e-3)
        assert record["eta_seconds"] == pytest.approx(record["step_seconds"] * (5 - record["step"]), abs=0.06)
        flops = record["tokens_per_second"] * sizes_of(config, 257).flops_per_token
        assert record["model_flops_per_second"] == pytest.approx(flops, rel=1e-2)
        assert record["mfu"] == pytest.approx(flops / 2e12, abs=1e-4)
        assert 0 < record["gate_time_share"] < 1
        assert 2**26 < record["peak_memory_bytes"] < 2**35
        assert (record["skipped_steps"], "loss_scale" in record) == (0, False)
    assert records[-1]["seconds"] < whole
    # Two micro-batches a step and two steps a record.
    before, waited, _ = (record["data_wait_share"] * 2 * record["step_seconds"] for record in records)
    assert before < waited
    assert waited > 0.98 * 4 * DELAY
    assert records[1]["data_wait_share"] <= 1
    assert f"trained on {5 * 1024:,} tokens" in said
    assert nothing == ""


def _norms(config, folder):
    """Of the first step's gradients as recorded, and summed from those of the same model."""
    run = train.Run(config, Path(folder))
    plain = {"deepspeed": {**config.deepspeed, "zero_optimization": {"stage": 0}}}
    engine = _build_engine(replace(config, **plain), run.corpus.vocabulary, 0)
    micro = engine.train_micro_batch_size_per_gpu()
    batches = data.training_batches(run.corpus, config.data, first_sample=0, micro_batch=micro, rank=0, ranks=1)
    tokens, labels, _ = next(batches)
    engine.backward(engine(tokens, labels).loss)
    squares = sum(float(weight.grad.double().square().sum()) for weight in engine.module.parameters())
    run.train()
    (record,) = (r for r in read_json_lines(Path(folder) / "metrics.jsonl") if r["kind"] == "train")
    return record["gradient_norm"], squares**0.5


@pytest.mark.parametrize("stage", [0, 1])
def test_the_gradients_norm_is_that_before_clipping_and_null_where_deepspeed_computes_none(cache, tmp_path, stage):
    config = tiny_run(
        cache,
        model={"ep_size": 1},
        ssr={"rule": "none", "noise": {"scale": 0.0}},
        deepspeed={
            "gradient_clipping": 1e-3,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage},
        },
        steps=1,
    )
    ((norm, summed),) = run_ranks(1, _norms, config, str(tmp_path / "run"), folder=tmp_path)
    assert summed > 0.1
    assert norm == (pytest.approx(summed, rel=1e-5) if stage else None)


def _counted(config):
    """Operations of a forward and backward pass over 256 tokens."""
    engine = _build_engine(config, 257, 0)
    tokens = torch.randint(0, 257, (4, 65))
    # The counter does not know the CPU's flash attention; plain products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]).loss)
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "model"),
    [
        (1.0, {}),
        (1.25, {"top_k": 1}),
        (1.0, {"tie_embeddings": False, "moe_every": 2, "layers": 4}),
        (2.0, {"residual": True}),
    ],
)
def test_the_operations_of_a_token_are_those_that_torch_counts(factor, model, cache, tmp_path):
    """The experts work on all their slots, taken or not: at a capacity factor of c, on c times the active ones."""
    config = tiny_run(cache, model={"ep_size": 1, "capacity_factor": factor, **model}, ssr={"rule": "none"})
    sizes, tokens = sizes_of(config, 257), 4 * 64
    (counted,) = run_ranks(1, _counted, config, folder=tmp_path)
    experts = sizes.expert_parameters * config.model.top_k // config.model.experts
    empty = 6 * experts * (factor - 1)
    assert counted / tokens == pytest.approx(sizes.flops_per_token + empty, rel=0.01)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_device_is_known_by_whole_words_of_its_name(device, peak):
    assert peak_of(device) == peak


def test_gates_are_timed_from_start_to_stop_and_passes_that_break_off_do_not_count(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 4.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr(devices, "_mark", lambda: next(moments))

    class Gate(torch.nn.Module):
        def forward(self, breaks):
            if breaks:
                raise RuntimeError("all that is needed is there")

    gate = Gate()
    timer = GateTimer([gate])
    assert timer.stop() is None
    timer.start()  # at 0
    gate(False)  # 1 to 3
    with pytest.raises(RuntimeError):
        gate(True)  # from 4 on
    gate(False)  # 5 to 6
    assert timer.stop() == pytest.approx(0.3)
    gate(False)  # not timed: no moment is left
    assert next(moments, None) is None
    assert timer.stop() is None
    assert GateTimer([]).stop() is None


def _on_terminal(name, function, *arguments):
    """Call it where stderr is that terminal; what it prints on stdout."""
    os.dup2(os.open(name, os.O_RDWR | os.O_NOCTTY), 2)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        function(*arguments)
    return said.getvalue()


def shown_on_terminal(ranks, function, *arguments, folder):
    """What ranks write to the terminal that is their stderr, and what each prints on stdout."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 120))
    shown = bytearray()

    def read():
        while not shown.endswith(b"END"):
            shown.extend(os.read(terminal, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        said = run_ranks(ranks, _on_terminal, os.ttyname(end), function, *arguments, folder=folder)
    finally:
        os.write(end, b"END")
        reader.join()
        os.close(terminal)
        os.close(end)
    return shown.decode(), said


def _train(config, folder):
    train.Run(config, Path(folder)).train()


def test_on_a_terminal_a_run_shows_one_bar_and_no_lines_of_steps(cache, tmp_path):
    config = tiny_run(cache, steps=3)
    shown, said = shown_on_terminal(2, _train, config, str(tmp_path / "run"), folder=tmp_path)
    assert shown.count(" 0/3 [") == 1
    assert re.search(r"100%\|.*\| 3/3 \[.*step.*loss=.*imbalance=", shown)
    assert not any("step 3/3" in lines for lines in said)


def test_on_a_terminal_preparing_shows_how_far_it_is(cache, tmp_path):
    options = ["--config", "tiny_cpu", "--set", f"data.source={cache}/speeches", "--workers", "1"]
    options += ["--output", str(tmp_path / "prepared")]
    shown, (said,) = shown_on_terminal(1, prepare.main, options, folder=tmp_path)
    assert re.search(r"tokenising: 100%\|.*B/s", shown)
    assert said.startswith("prepared")
