"""What the checks conclude from what the ranks report, without ranks."""

import itertools
from datetime import timedelta

import pytest

from ssr_deepspeed.preflight.equality import differences
from ssr_deepspeed.preflight.findings import Finding, Status, judged, summary, table
from ssr_deepspeed.preflight.hosts import _control_groups, _left
from ssr_deepspeed.preflight.job import Job, Outcome, spans
from ssr_deepspeed.preflight.joined import shared_devices
from ssr_deepspeed.preflight.layout import Layout, layout_table
from ssr_deepspeed.preflight.links import slow_links, tournament
from ssr_deepspeed.preflight.network import slow_groups
from ssr_deepspeed.pretrain.config import load_run
from ssr_deepspeed.pretrain.ranks import be_alone, expected_hosts, expected_ranks


def job_on(*hosts):
    return Job(0, hosts, None, timedelta(seconds=1))


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8, 33])
def test_in_a_tournament_everyone_meets_everyone_once_and_nobody_twice_at_a_time(ranks):
    rounds = tournament(ranks, 1000)
    assert sorted(itertools.chain(*rounds)) == sorted(itertools.combinations(range(ranks), 2))
    for pairs in tournament(ranks, 5):
        assert len(set(itertools.chain(*pairs))) == 2 * len(pairs) == ranks - ranks % 2
    assert len(tournament(ranks, 5)) == min(5, ranks - 1 + ranks % 2)


def times(ranks, slow=(), factor=4.0, hosts=None):
    """Seconds of all pairs: those within a host a tenth of the others, and the slow ones `factor` times as long."""
    result = {}
    for a, b in itertools.combinations(range(ranks), 2):
        usual = 0.01 if hosts and hosts[a] == hosts[b] else 0.1
        result[a, b] = usual * (factor if {a, b} & set(slow) or (a, b) in slow else 1.0)
    return result


def test_slow_ranks_hosts_and_links_are_told_apart():
    alone = job_on(*"abcde")
    assert slow_links(alone, times(5), 0.0) == []
    (told,) = slow_links(alone, times(5, slow=[3]), 0.0)
    assert told.startswith("rank 3 (d) takes 4.0 times as long as most")
    (told,) = slow_links(alone, times(5, slow=[(1, 4)]), 0.0)
    assert told.endswith("most of their kind take: rank 1 (b) and rank 4 (e), 4.0 times")
    (told,) = slow_links(job_on(*"abc"), times(3, slow=[0]), 0.0)
    assert told.startswith("rank 0 (a) ")
    hosts = "aaaabbbbccccdddd"
    assert slow_links(job_on(*hosts), times(16, hosts=hosts), 0.0) == []
    told = slow_links(job_on(*hosts), times(16, hosts=hosts, slow=range(8, 12)), 0.0)
    assert [sentence.split(")")[0] for sentence in told] == [f"rank {rank} (c" for rank in range(8, 12)]
    assert slow_links(alone, times(5, slow=[3]), noise=1.0) == []


def test_a_slow_expert_parallel_group_is_named():
    job, groups, seconds = job_on(*"aabbcc"), [(0, 1), (2, 3), (4, 5)], [0.1, 0.3, 0.1]
    assert slow_groups(job, groups, seconds, noise=0.3) == []
    (told,) = slow_groups(job, groups, seconds, noise=0.0)
    assert told.startswith("the expert-parallel group of ranks 2-3 (b) takes 300 ms, 3.0 times")


def test_the_odd_ranks_are_those_with_another_value_than_most():
    settings = [{"torch": "2.13"}, {"torch": "2.13"}, {"torch": "2.12"}, {"torch": "2.13", "NCCL": None}, {}]
    (told,) = differences(job_on(*"aabbc"), settings)
    assert told == "torch is '2.12' on rank 2 (b), not set on rank 4 (c), and '2.13' on the others"


def test_two_ranks_on_one_device_are_named_and_on_two_hosts_are_not():
    devices = [Outcome(name, None) for name in ("0", "1", "0", "0")]
    assert shared_devices(job_on(*"aabb"), devices) == ["ranks 2-3 (b) share the device 0"]
    assert shared_devices(job_on("a", "a"), [Outcome(None, None)] * 2) == []


@pytest.mark.parametrize("ep_size", [2, 64, 512])
def test_the_table_of_a_large_job_stays_short_and_names_every_expert(ep_size):
    ranks = range(512)
    layout = Layout(
        tuple(tuple(ranks[start : start + ep_size]) for start in range(0, 512, ep_size)),
        tuple(tuple(ranks[place::ep_size]) for place in range(ep_size)),
        1024 // ep_size,
    )
    job = job_on(*(f"host{rank // 8:02}" for rank in ranks))
    model = load_run("tiny_cpu", ["model.experts=1024", f"model.ep_size={ep_size}", "model.layers=60"]).model
    lines = layout_table(job, model, layout).splitlines()
    assert len(lines) <= 21
    assert max(map(len, lines)) < 250
    bounds = [tuple(map(int, line.split()[0].split("-"))) for line in lines[1:]]
    assert [first for first, _ in bounds] == [0, *(last + 1 for _, last in bounds[:-1])]
    assert bounds[-1][1] == 1023
    assert layout.experts_of(ep_size - 1)[-1] == 1023


def test_environments_of_launchers_and_schedulers_say_how_many_should_join():
    assert expected_ranks({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "PET_NNODES": "2:3", "SLURM_NTASKS": ""}) == {
        "WORLD_SIZE": 8,
        "PET_NNODES * LOCAL_WORLD_SIZE": 8,
    }
    assert expected_hosts({"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2"}) == ("SLURM_STEP_NUM_NODES", 2)
    assert expected_hosts({}) == ("", 0)


def test_a_task_among_others_does_not_train_by_itself(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(SystemExit, match="ssr-x: SLURM_NTASKS = 2, but no RANK is set"):
        be_alone("ssr-x")


def test_the_memory_that_control_groups_leave_is_found_in_both_versions(tmp_path):
    own = tmp_path / "own"
    for prefix, mount, names in (
        ("5:memory:/", tmp_path / "one" / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
        ("0::/", tmp_path / "two", ("memory.max", "memory.current", "")),
    ):
        (mount / "job" / "step").mkdir(parents=True)
        limit, used, total = names
        (mount / "job" / limit).write_text("1000\n")
        (mount / "job" / used).write_text("700\n")
        (mount / "job" / "memory.stat").write_text(f"anon 5\n{total}inactive_file 50\n")
        (mount / "job" / "step" / limit).write_text("max\n")
        own.write_text(f"3:cpu:/\n{prefix}job/step\n")
        folders = _control_groups(tmp_path / mount.relative_to(tmp_path).parts[0], own)
        assert folders == [mount / "job" / "step", mount / "job", mount]
        assert min(map(_left, folders)) == 350


def test_a_table_has_a_line_a_check_and_one_for_each_further_sentence():
    findings = [judged("a", "fine"), judged("bcd", "fine", failures=["x", "y"], warnings=["z"])]
    assert table(findings).splitlines() == [
        "ok       a    fine",
        "FAILURE  bcd  x",
        "              y",
        "              z",
    ]
    findings.append(Finding("e", Status.WARNING, ("w",)))
    assert summary(findings) == "1 failed, 1 warned, 1 ok"


def test_numbers_are_folded():
    assert spans([3, 0, 1, 2, 7]) == "0-3, 7"
    assert spans(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14 and 12 more"
