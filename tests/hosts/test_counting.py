"""What the load monitor counts on real engines: every training route once, on every host, without a wait."""

import contextlib
import csv
import io
import json
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ssr_deepspeed
import ssr_deepspeed.monitor.counts
from ssr_deepspeed.gate import HOST_HAS_SPARSE_ROUTES
from ssr_deepspeed.monitor.records import RunLog
from ssr_deepspeed.monitor.sinks import keep_records, scalars
from tests.disks import files_limited_to
from tests.gloo import run_ranks
from tests.hosts.families import skip_where_autoep_crashes, tiny_model
from tests.toy import EXPERTS, WIDTH, ToyModel, build_engine

MODES = {
    "none": lambda function, *inputs: function(*inputs),
    "torch": lambda function, *inputs: checkpoint(function, *inputs, use_reentrant=False),
    "torch reentrant": lambda function, *inputs: checkpoint(function, *inputs, use_reentrant=True),
    "deepspeed": lambda function, *inputs: deepspeed.checkpointing.non_reentrant_checkpoint(function, *inputs),
    "deepspeed reentrant": lambda function, *inputs: deepspeed.checkpointing.checkpoint(function, *inputs),
}
# Routes depend on the batch alone: weights that stay, and a rule that keeps nothing.
STILL = {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0, "torch_adam": True}}
BLOCK = {"rule": "ssr", "probability": 1.0, "monitor": {"interval": 2}}


class Native(ToyModel):
    """Every MoE layer behind activation checkpointing of some kind."""

    mode = "none"

    def forward(self, x, used):
        for layer in self.layers:
            x = x + MODES[self.mode](lambda x, used, layer=layer: layer(x, used)[0], x, used)
        return x


def native(enabled, layers):
    model = Native(2, dist.get_rank(), k=1, moe_layers=layers)
    block = {**BLOCK, "enabled": enabled}
    engine = build_engine(model, block, optimizer=STILL, gradient_accumulation_steps=2)

    def loss(tokens, used):
        x = torch.nn.functional.one_hot(tokens % WIDTH, WIDTH).float() + tokens.unsqueeze(2) / 50
        return engine(x.requires_grad_(), used.flatten()).square().mean()

    return engine, loss, lambda mode: setattr(model, "mode", mode), lambda output: output[3].t()


def plain(enabled, expert_parallel):
    model = tiny_model("qwen3_moe").train()
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "optimizer": STILL}
    config["ssr"] = {**BLOCK, "enabled": enabled}
    config["zero_optimization"] = {"stage": 1}
    if expert_parallel:
        config["expert_parallel"] = {"enabled": True, "autoep_size": 2}
    engine = deepspeed.initialize(model=model, config=config)[0]
    model.enable_input_require_grads()

    def loss(tokens, used):
        return engine(input_ids=tokens, attention_mask=used.long(), labels=tokens).loss

    def set_mode(mode):
        model._set_gradient_checkpointing(mode != "none", MODES[mode])

    return engine, loss, set_mode, lambda output: output[1] if expert_parallel else output[2]


HOSTS = {
    "TopKGate": lambda: native(False, 2),
    "SSRGate": lambda: native(True, 3),
    "transformers": lambda: plain(False, False),
    "transformers, SSR's": lambda: plain(True, False),
    "AutoEP": lambda: plain(False, True),
    "AutoEP, SSR's": lambda: plain(True, True),
}


class NoWait(TorchDispatchMode):
    """Fails on what reads from the device or makes a size of what is on it."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "bincount", "unique", "masked_select", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


def without_waiting(function):
    def call(*args, **kwargs):
        with NoWait():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def reductions_of(monitor):
    """The all-reduces that happen while the monitor closes a step."""
    found, inside, original, end_step = [], [False], dist.all_reduce, monitor.end_step

    def all_reduce(tensor, *args, **kwargs):
        found.extend([tensor.numel()] * inside[0])
        return original(tensor, *args, **kwargs)

    def closing(engine):
        inside[0] = True
        end_step(engine)
        inside[0] = False

    dist.all_reduce, monitor.end_step = all_reduce, closing
    try:
        yield found
    finally:
        dist.all_reduce = original


def batches():
    """Tokens of two steps of two micro-batches, and which of them are no padding; other ones on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        tokens = torch.randint(3, 64, (2, 12), generator=generator)
        yield tokens, torch.arange(12) < torch.randint(4, 12, (2, 1), generator=generator)


def window(engine, loss, windows):
    """The demand of a window of two steps, with an evaluation between them."""
    for number, (tokens, used) in enumerate(batches()):
        engine.backward(loss(tokens, used))
        engine.step()
        if number == 1:
            engine.eval()
            with torch.no_grad():
                loss(tokens, used)
            engine.train()
    return windows[-1].demand_WLE.long()


def remember(seen, layer, indices_of):
    def hook(router, inputs, output):
        seen.append((layer, indices_of(output)))

    return hook


def _every_host_in_every_mode(hosts):
    ssr_deepspeed.install()
    ssr_deepspeed.monitor.counts._AT_ONCE = 2  # at every step, so that no step is too short for it
    for host in hosts:
        torch.manual_seed(0)
        engine, loss, set_mode, indices_of = HOSTS[host]()
        monitor, windows, seen = engine.ssr._monitor, [], []
        write, end_step = monitor._write, monitor.counts.end_step
        monitor._write = lambda window, windows=windows, write=write: (windows.append(window), write(window))
        for handle in monitor._hooks:
            hooks = handle.hooks_dict_ref()
            hooks[handle.id] = without_waiting(hooks[handle.id])
        monitor.counts.end_step = lambda step, end=end_step: (without_waiting(end) if step % 2 == 0 else end)(step)
        watches = []
        for layer, name in enumerate(engine.ssr.layers):
            router = engine.module.get_submodule(name)
            watches.append(router.register_forward_hook(remember(seen, layer, indices_of)))
        with reductions_of(monitor) as reductions:
            found = window(engine, loss, windows)
            for watch in watches:
                watch.remove()
            # Passes come in the order in which the model was called: the third call is the evaluation.
            layers, expected = len(engine.ssr.layers), torch.zeros_like(found)
            calls = [seen[i : i + layers] for i in range(0, len(seen), layers)]
            assert len(calls) == 5
            for number, (call, (_, used)) in enumerate(zip(calls[:2] + calls[3:], batches(), strict=True)):
                for layer, indices_TK in call:
                    chosen = indices_TK[used.flatten()].flatten()
                    expected[number // 2, layer] += torch.bincount(chosen[chosen >= 0], minlength=found.shape[2])
            dist.all_reduce(expected)
            assert torch.equal(found, expected), host
            for mode in list(MODES)[1:]:
                set_mode(mode)
                assert torch.equal(window(engine, loss, windows), expected), (host, mode)
        assert len(reductions) == len(windows) == 5, host
        assert len(set(reductions)) == 1


@pytest.mark.skipif(not HOST_HAS_SPARSE_ROUTES, reason="this DeepSpeed's gates return no indices to count against")
@pytest.mark.parametrize("hosts", [["TopKGate", "SSRGate"], list(HOSTS)[2:]], ids=["native", "token routers"])
def test_every_training_route_is_counted_once_without_a_wait_and_reduced_once_a_window(tmp_path, hosts):
    """Under each kind of activation checkpointing, against the indices that routers returned without it."""
    if "TopKGate" not in hosts:
        skip_where_autoep_crashes("qwen3_moe")
    run_ranks(2, _every_host_in_every_mode, hosts, folder=tmp_path)


def _resume(folder):
    ssr_deepspeed.install()

    def engine_for(path):
        torch.manual_seed(0)
        block = {"monitor": {"interval": 4, "path": str(path), "alerts": {"max_vio": 0.2}}}
        return build_engine(ToyModel(2, dist.get_rank()), block, zero=1)

    def train(engine, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
            engine.backward(engine(torch.randn(1, 24, WIDTH, generator=generator) + 0.5).square().mean())
            engine.step()

    train(engine_for(folder / "whole.jsonl"), 0, 13)
    left = engine_for(folder / "resumed.jsonl")
    train(left, 0, 6)
    left.save_checkpoint(str(folder / "checkpoints"))
    train(left, 6, 9)
    left.ssr.release()  # killed: its last line is half there
    dist.barrier()
    if dist.get_rank() == 0:
        with (folder / "resumed.jsonl").open("a") as file:
            file.write('{"kind":"load","step":12,"st')
    resumed = engine_for(folder / "resumed.jsonl")
    resumed.load_checkpoint(str(folder / "checkpoints"))
    train(resumed, 6, 13)


def test_a_run_resumed_within_a_window_writes_what_an_uninterrupted_one_does(tmp_path):
    run_ranks(2, _resume, tmp_path, folder=tmp_path)
    whole, resumed = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("whole.jsonl", "resumed.jsonl")
    )
    assert [record["step"] for record in resumed if record["kind"] == "load"] == [4, 8, 12]
    assert any(record["kind"] == "alert" for record in whole)
    without_time = [[{**record, "time": 0} for record in records] for records in (whole, resumed)]
    assert without_time[0] == without_time[1]


def _looked_at_and_begun_again(folder):
    """Windows and open alerts after: a run, a look at its older checkpoint, another run on its file, a full disk."""
    ssr_deepspeed.install()
    path = folder / "load.jsonl"
    alerts = {"dead_windows": 0, "max_vio": 0.0}
    block = {"enabled": False, "monitor": {"interval": 2, "path": str(path), "alerts": alerts}}
    found = []

    def train(engine, steps):
        for _ in range(steps):
            engine.backward(engine(torch.randn(1, 8, WIDTH)).square().mean())
            engine.step()
        log = RunLog(path)
        found.append((log.steps("load"), {alert["since"] for alert in log.raised()}))

    engine = build_engine(ToyModel(), block, zero=1)
    train(engine, 2)
    engine.save_checkpoint(folder / "checkpoint")
    train(engine, 4)
    engine.load_checkpoint(folder / "checkpoint")
    found.append((RunLog(path).steps("load"), None))
    with path.open("a") as file:
        file.write('{"kind":"alert","step":6,"damaged}\n')
    train(engine, 2)
    train(build_engine(ToyModel(), block), 2)
    broken = build_engine(ToyModel(), block)
    # Weights alone, from another run's checkpoint: this run's records stay.
    fresh = build_engine(ToyModel(), block, zero=1)
    fresh.load_checkpoint(folder / "checkpoint", load_module_only=True)
    train(fresh, 2)
    found.append((path.read_text().count('"kind":"load"'), None))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with files_limited_to(path.stat().st_size + 100):
            train(broken, 4)
        assert broken.ssr.report["step"] == 4
        train(broken, 4)
    lines = path.read_text().count("\n")
    assert said.getvalue().count("SSR WARNING: cannot write load records: [Errno 27] File too large; make room") == 1
    assert said.getvalue().count("writes load records again") == 1
    keep_records(path, lambda record: True)
    assert len(path.read_text().splitlines()) == lines - 1, "only the line above is no record"
    return found


def test_records_outlive_a_look_at_an_older_checkpoint_a_full_disk_and_another_run(tmp_path):
    (found,) = run_ranks(1, _looked_at_and_begun_again, tmp_path, folder=tmp_path)
    assert found == [
        ([2], {0}),
        ([2, 4, 6], {0}),
        ([2, 4, 6], None),
        ([2, 4], {0}),
        ([2], {0}),
        ([2], {0}),
        (4, None),
        ([2], {0}),
        ([2, 4, 6, 8], {0}),
    ]


def _csv(folder):
    ssr_deepspeed.install()
    engine = build_engine(
        ToyModel(),
        {"enabled": False, "monitor": {"interval": 2, "path": f"{folder}/load.jsonl"}},
        csv_monitor={"enabled": True, "output_path": str(folder), "job_name": "job"},
    )
    for _ in range(5):
        engine.backward(engine(torch.randn(1, 8, WIDTH)).square().mean())
        engine.step()
    assert engine.train_batch_size() == 1
    assert EXPERTS == 4


def test_deepspeeds_own_monitor_gets_every_scalar_of_every_window(tmp_path):
    run_ranks(1, _csv, tmp_path, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "load.jsonl").read_text().splitlines()]
    reports = [record for record in lines if record["kind"] == "load"]
    assert [report["step"] for report in reports] == [2, 4]
    expected = {}
    for report in reports:
        for name, value in scalars(report).items():
            expected.setdefault(f"Train_SSR_{name.replace('/', '_')}.csv", []).append((report["step"], value))
    assert "Train_SSR_layers.1.deepspeed_moe.gate_max_vio.csv" in expected
    found = {}
    for file in Path(tmp_path / "job").glob("Train_SSR_*.csv"):
        _, *rows = csv.reader(file.open())
        found[file.name] = [(int(samples), float(value)) for samples, value in rows]
    assert found == expected
