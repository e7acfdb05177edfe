"""Each fault provoked on real ranks, several to one start of the processes."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import ssr_deepspeed
from ssr_deepspeed.preflight import equality, hosts, links, network, storage
from ssr_deepspeed.preflight.checks import Request, run_checks
from ssr_deepspeed.preflight.findings import Status, table
from ssr_deepspeed.preflight.job import join
from ssr_deepspeed.preflight.joined import check_ranks
from ssr_deepspeed.preflight.storage import check_disk
from ssr_deepspeed.pretrain.config import load_run
from ssr_deepspeed.pretrain.folder import HOLDS_RUN
from ssr_deepspeed.pretrain.prepare import prepare
from ssr_deepspeed.pretrain.sizes import checkpoint_bytes, memory_of
from tests.gloo import run_ranks

SMALL = [
    "model.width=32",
    "model.expert_width=32",
    "model.experts=4",
    "data.sequence_length=64",
    "deepspeed.zero_optimization.reduce_bucket_size=1000",
    "data.cache=/nowhere",
]


@contextmanager
def faults():
    """Patches, environment and folder of this rank, undone at the end."""
    home = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    os.chdir(home)


def found(patch, *, overrides=(), hosts=None, limit=30, **request):
    """The findings by their checks, on this rank, which must be those of the other ranks."""
    if hosts:
        patch.setattr(socket, "gethostname", lambda: hosts[dist.get_rank()])
    job = join(timedelta(seconds=limit))
    findings, experts = run_checks(job, Request(config="tiny_cpu", overrides=[*SMALL, *overrides], **request))
    assert len(set(job.gather((table(findings), experts)))) == 1
    return {finding.check: finding for finding in findings}


def sentence(findings, check, status):
    assert findings[check].status is status, table(list(findings.values()))
    return " ".join(findings[check].sentences)


def spoil(collective, patch, index):
    """Make `collective` of torch.distributed return with one element of its result changed."""
    original = getattr(dist, collective)

    def spoiled(output, *arguments, **options):
        work = original(output, *arguments, **options)
        work.wait()
        if output.numel() > index and output.dtype is torch.float32:
            output.view(torch.int32).bitwise_xor_(torch.where(torch.arange(output.numel()) == index, 1 << 23, 0))
        return work

    patch.setattr(dist, collective, spoiled)


def _software(rank):
    """Another version of each thing on rank 1, those that belong to a GPU among them."""
    packages = ("datasets", "triton", "accelerate")
    with faults() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda.nccl, "version", lambda: (2, 28 + rank, 9))
        patch.setattr(torch.cuda, "get_device_name", lambda: ["H", "A"][rank])
        if rank == 1:
            version = importlib.metadata.version
            patch.setattr(importlib.metadata, "version", lambda name: "0" if name in packages else version(name))
            patch.setattr(torch, "__version__", "2.0")
            patch.setattr(torch.version, "cuda", "1.0")
            patch.setattr(equality, "_hash_of_files", lambda: "f00")
            patch.setattr(platform, "python_version", lambda: "3.0")
        patch.setattr(socket, "gethostname", lambda: "ab"[rank])
        finding = equality.check_versions(join(timedelta(seconds=30)))
    told = dict.fromkeys(packages, "'0'")
    told |= {"python": "'3.0'", "torch": "'2.0'", "CUDA": "'1.0'", "NCCL": "'2.29.9'", "GPU": "'A'"}
    told["ssr_deepspeed"] = f"'{ssr_deepspeed.__version__} (files f00)'"
    assert finding.status is Status.FAILURE
    assert {sentence.partition(" on rank 1 (b), and ")[0] for sentence in finding.sentences} == {
        f"{name} is {value}" for name, value in told.items()
    }


def _software_and_settings(rank, text):
    with faults() as patch:
        if rank == 1:
            patch.setenv("NCCL_SOCKET_IFNAME", "eth7")
        patch.setenv("CUDA_VISIBLE_DEVICES", ["0,1", "1"][rank])
        result = found(patch, overrides=[text, f"steps={400 + 20 * rank}"], quick=True, hosts="ab")
        assert result["versions"].status is Status.OK
        assert "number of CUDA_VISIBLE_DEVICES is '1' on rank 1 (b), and '2' on" in sentence(
            result, "environment", Status.WARNING
        )
        assert "NCCL_SOCKET_IFNAME is 'eth7' on rank 1 (b), and not set" in sentence(
            result, "environment", Status.WARNING
        )
        assert "steps is 420 on rank 1 (b), and 400 on the others" in sentence(result, "configuration", Status.FAILURE)
        for check in ("experts", "all-to-all", "text", "memory"):
            assert "not checked" in sentence(result, check, Status.SKIPPED)
    with faults() as patch:
        result = found(patch, overrides=[text, f"model.top_k={[2, 9][rank]}"], quick=True)
        assert "rank 1 (" in sentence(result, "configuration", Status.FAILURE)
        assert "model.top_k = 9; allowed: 1 to experts" in " ".join(result["configuration"].sentences)
    with faults() as patch:
        result = found(patch, overrides=[text, "ranks=3", "deepspeed.train_batch_size=9"], quick=True)
        told = sentence(result, "configuration", Status.FAILURE)
        assert "ranks = 3, but 2 started" in told
        assert "deepspeed.train_batch_size = 9 is not 2 ranks" in told
        assert result["experts"].status is Status.OK


def _network(rank, text):
    for collective, check, index in (("all_to_all_single", "all-to-all", 5), ("all_reduce", "all-reduce", 7)):
        with faults() as patch:
            if rank == 1:
                spoil(collective, patch, index)
            result = found(patch, overrides=[text], quick=True, hosts="ab")
            told = sentence(result, check, Status.FAILURE)
            assert told.startswith("rank 1 (b) "), told
            assert "rank 0 (a)" in told or "rank 1 (b)" in told.split("that", 1)[1]
            assert sum(finding.failed for finding in result.values()) == 1
    with faults() as patch:
        if rank == 1:  # this rank's part never reaches the other
            done = type("Done", (), {"wait": lambda *_: True})
            patch.setattr(dist, "all_reduce", lambda *_, **__: done())
        begun = time.monotonic()
        result = found(patch, overrides=[text], quick=True, limit=1)
        assert time.monotonic() - begun < 20
        assert "GLOO_SOCKET_IFNAME" in sentence(result, "all-reduce", Status.FAILURE)
        assert "see all-reduce" in sentence(result, "all-to-all", Status.SKIPPED)


def _storage_and_clocks(rank, text, folder, small_disk):
    with faults() as patch:
        if small_disk is None:
            usage = shutil.disk_usage("/")._replace(free=2**16)
            patch.setattr(shutil, "disk_usage", lambda _: usage)
        result = found(patch, overrides=[text], quick=True, output=(small_disk or folder) / "run")
        assert "GB are free" in sentence(result, "disk", Status.FAILURE)
        assert result["output"].status is Status.OK
        assert not ((small_disk or folder) / "run").exists()
    with faults() as patch:
        patch.setattr(storage, "_SECONDS", 0.2)
        if rank == 1:
            now = time.time
            patch.setattr(time, "time", lambda: now() + 7.0)
        (folder / str(rank)).mkdir(exist_ok=True)
        os.chdir(folder / str(rank))
        if rank == 0:
            shutil.copytree(text.partition("=")[2], "speeches", dirs_exist_ok=True)
        result = found(patch, overrides=["data.source=./speeches"], quick=True, output=storage.Path("run"), hosts="ab")
        assert "the clock of b is 7.0 s ahead of that of a" in sentence(result, "clocks", Status.WARNING)
        assert "rank 1 (b): does not see the file that rank 0 (a) wrote" in sentence(result, "output", Status.FAILURE)
        assert "rank 1 (b): data.source = './speeches': there is no such file" in sentence(
            result, "text", Status.FAILURE
        )
    with faults() as patch:
        (folder / "file").touch()
        result = found(patch, overrides=[text, "model.expert_width=9000000"], quick=True, output=folder / "file" / "x")
        assert "NotADirectoryError" in sentence(result, "output", Status.FAILURE)
        assert "are free for it: lower" in sentence(result, "memory", Status.FAILURE)
    config, job = load_run("tiny_cpu", [*SMALL, text]), join(timedelta(seconds=30))
    needed = sum(memory_of(config, 257, 2).values())
    for share, status in ((0.78, Status.OK), (0.82, Status.WARNING), (0.93, Status.WARNING), (0.97, Status.FAILURE)):
        with faults() as patch:
            patch.setattr(hosts, "_free_bytes", lambda _, share=share: needed / [0.5, share][rank])
            finding = hosts.check_memory(job, config, 257)
        assert finding.status is status, finding
        assert finding.sentences[0].startswith("rank 1 (") == (status is not Status.OK)


def _a_run_that_is_there(rank, text, folder):
    """What is to become of it is the same on every host, and asked before the run is waited for."""
    home = folder / "there"

    def told(status, *existing):
        with faults() as patch:
            one = existing[min(rank, len(existing) - 1)]
            return sentence(
                found(patch, overrides=[text], quick=True, output=home, existing=one, hosts="ab"), "output", status
            )

    for other in ("weights", "refuse"):
        said = told(Status.FAILURE, "resume", other)
        assert f"(--resume, --overwrite) is '{other}' on rank 1 (b), and 'resume' on the others: give" in said
    told(Status.OK, "refuse")
    job = join(timedelta(seconds=30))
    job.attempt(lambda: (home.mkdir(), (home / "metrics.jsonl").write_text("{}\n")), here=rank == 0)
    assert told(Status.FAILURE, "refuse") == HOLDS_RUN.format(folder=home)
    for existing in ("resume", "weights", "overwrite"):
        told(Status.OK, existing)


def _disk_beside_checkpoints(text, folder):
    """Room is what is free and what the run itself will remove; a damaged checkpoint stays when it resumes."""
    job, config = join(timedelta(seconds=30)), load_run("tiny_cpu", [*SMALL, text])
    one = checkpoint_bytes(config, 257)
    home = folder / f"kept_{job.rank}"
    for name in ("step_20.damaged", "step_20", "step_40.partial"):
        (home / "checkpoints" / name).mkdir(parents=True)
        with (home / "checkpoints" / name / "weights").open("wb") as file:
            file.truncate(one)

    def told(kept, existing="resume"):
        """With room for as many as are to be kept, and for the one being written."""
        with faults() as patch:
            usage = shutil.disk_usage("/")._replace(free=0)
            patch.setattr(shutil, "disk_usage", lambda _: usage)
            return check_disk(job, home, existing, replace(config, keep_checkpoints=kept), 257).status

    assert told(1) is Status.OK
    assert told(2) is Status.FAILURE
    assert told(2, "overwrite") is Status.OK
    assert told(3, "overwrite") is Status.FAILURE


def _prepared_text(rank, text, folder):
    """Each rank in a folder of its own, where a document is missing on rank 1 when the text is prepared again."""
    home = folder / f"text_{rank}"
    shutil.copytree(text.partition("=")[2], home / "speeches")
    config = load_run("tiny_cpu", [*SMALL, f"data.source={home}/speeches"]).data
    prepare(config, output=home / "whole")
    if rank == 1:
        (home / "speeches" / "0.txt").unlink()
    prepare(config, output=home / "other")
    with faults() as patch:
        os.chdir(home)
        hidden = "data.source=./nowhere.txt"
        result = found(patch, overrides=[hidden, "data.prepared=whole"], quick=True, hosts="ab")
        assert "the same tokens everywhere" in sentence(result, "text", Status.OK)
        result = found(patch, overrides=[hidden, "data.prepared=other"], quick=True, hosts="ab")
        assert "the fingerprint of the tokens is" in sentence(result, "text", Status.FAILURE)
        assert "on rank 1 (b), and " in sentence(result, "text", Status.FAILURE)
        result = found(patch, overrides=["data.source=nobody/nothing"], quick=True, hosts="ab")
        assert "nobody/nothing" in sentence(result, "text", Status.FAILURE)


def _who_joined(text, folder):
    with faults() as patch:
        result = found(patch, overrides=[text, "model.ep_size=4"], quick=True)
        assert "ep_size = 4 does not divide the 2 ranks" in sentence(result, "experts", Status.FAILURE)
    job = join(timedelta(seconds=30))

    def told(expected=None, hostfile=None, status=Status.FAILURE, **environment):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return sentence({"ranks": check_ranks(job, expected, hostfile)}, "ranks", status)

    (folder / "hosts").write_text("worker-0 slots=2\nworker-1 slots=2\n")
    (folder / "empty").write_text("# nothing\n")
    assert told(status=Status.OK).startswith("2 joined on 1 host, as expected by WORLD_SIZE")
    assert "--expect-ranks = 4, but 2 joined" in told(expected=4)
    assert "there is no hostfile" in told(hostfile=folder / "none")
    assert "Hostfile is empty" in told(hostfile=folder / "empty")
    assert "4 slots on 2 hosts, but 2 ranks joined" in told(hostfile=folder / "hosts")
    assert "--expect-ranks" in told(expected=2, hostfile=folder / "hosts", status=Status.OK)
    for name, value in {"SLURM_NTASKS": "8", "NNODES": "2:4", "WORLD_SIZE": "3", "SLURM_JOB_NUM_NODES": "2"}.items():
        assert name in told(**{name: value})
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        assert f"{name} = 3, but 2 joined" in told(**{name: "3"})


def _two_ranks(text, folder, small_disk):
    rank = dist.get_rank()
    _software(rank)
    _software_and_settings(rank, text)
    _network(rank, text)
    _storage_and_clocks(rank, text, folder, small_disk)
    _a_run_that_is_there(rank, text, folder)
    _disk_beside_checkpoints(text, folder)
    _prepared_text(rank, text, folder)
    _who_joined(text, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A full file system of its own where this process may mount one, else None."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_two_ranks_agree_on_what_is_wrong_and_where(cache, tmp_path, small_disk):
    run_ranks(2, _two_ranks, f"data.source={cache}/speeches", tmp_path, small_disk, folder=tmp_path)


def _unequal_hosts():
    with faults() as patch:
        patch.setattr(socket, "gethostname", lambda: "aab"[dist.get_rank()])
        return check_ranks(join(timedelta(seconds=30)), None, None)


def test_hosts_with_unequal_numbers_of_ranks_are_named(tmp_path):
    for finding in run_ranks(3, _unequal_hosts, folder=tmp_path):
        assert finding.status is Status.WARNING
        assert finding.sentences[0].startswith("the hosts run unequal numbers of ranks (a 2, b 1)")


def _healthy_then_slow(text, folder, config):
    rank = dist.get_rank()
    with faults() as patch:
        patch.setattr(network, "_SECONDS", 0.1)
        result = found(patch, overrides=[text], output=folder / "run", hosts=["a", "a", "b", "b"], expect_ranks=4)
        assert not [finding for finding in result.values() if finding.failed], table(list(result.values()))
        for check in ("all-reduce", "all-to-all"):
            assert "GB/s a rank" in " ".join(result[check].sentences)
        assert "6 pairs" in " ".join(result["links"].sentences) or result["links"].status is Status.WARNING
        assert "use ssr-prepare" in sentence(result, "text", Status.WARNING)
    with faults() as patch:
        patch.setattr(links, "_REPEATS", 2)
        if rank == 2:
            send = dist.distributed_c10d.isend

            def late(*arguments, **options):
                time.sleep(0.1)
                return send(*arguments, **options)

            patch.setattr(dist.distributed_c10d, "isend", late)
            patch.setattr(dist, "isend", late)
        patch.setattr(socket, "gethostname", lambda: "abcd"[rank])
        links_found = links.check_links(join(timedelta(seconds=30)))
        told = sentence({"links": links_found}, "links", Status.WARNING)
        # The slowest first; on a busy machine others may be slow too, but not like this.
        assert told.startswith("rank 2 (c) takes"), told
    return _experts(config)


def _experts(config):
    """Experts that the layout says this rank holds, beside those that a real engine holds here."""
    from ssr_deepspeed.preflight.layout import check_experts, layout_table
    from ssr_deepspeed.pretrain.model import MoELanguageModel
    from ssr_deepspeed.pretrain.train import _build_engine

    job = join(timedelta(seconds=30))
    _, layout = check_experts(job, config.model)
    engine = _build_engine(config, 257, job.rank)
    whole = MoELanguageModel(replace(config.model, ep_size=1), 257, config.seed, 0)
    holds = []
    for here, everywhere in zip(engine.module.blocks, whole.blocks, strict=True):
        if not hasattr(here.feed_forward, "deepspeed_moe"):
            continue
        local, all_of_them = (
            [expert.w_in.weight for expert in block.feed_forward.deepspeed_moe.experts.deepspeed_experts]
            for block in (here, everywhere)
        )
        holds.append([next(i for i, other in enumerate(all_of_them) if torch.equal(own, other)) for own in local])
    replicas = next(ranks for ranks in layout.replicas if job.rank in ranks)
    return holds, list(layout.experts_of(job.rank)), replicas, layout_table(job, config.model, layout)


@pytest.mark.slow
def test_four_ranks_are_measured_a_slow_one_named_and_the_experts_are_where_the_table_says(cache, tmp_path):
    from tests.pretrain.tiny import tiny_run

    config = tiny_run(cache, model={"layers": 4, "moe_every": 2})
    results = run_ranks(4, _healthy_then_slow, f"data.source={cache}/speeches", tmp_path, config, folder=tmp_path)
    for rank, (holds, experts, replicas, text) in enumerate(results):
        assert holds == [experts, experts]
        assert replicas == tuple(other for other in range(4) if results[other][0] == holds)
        host = socket.gethostname()
        assert text.splitlines() == [
            "experts of the 2 MoE layers (blocks 1, 3), and the ranks that hold them",
            f"  0-1          ranks 0, 2 ({host})",
            f"  2-3          ranks 1, 3 ({host})",
        ], rank
