import itertools
import json

import pytest

from ssr_deepspeed.monitor.records import RunLog
from ssr_deepspeed.monitor.sinks import JsonLines


def write(folder, records, name="run"):
    sink = JsonLines(folder / name / "metrics.jsonl")
    for record in records:
        sink.write(record)
    sink.close()
    return folder / name


def load(step, value=0):
    return {"kind": "load", "step": step, "steps": 10, "value": value}


def experts(step):
    return {"kind": "experts", "step": step, "load_over_mean": [[1.0, step / 10]]}


def test_records_by_kind_and_loads_by_step(tmp_path):
    log = RunLog(write(tmp_path, [load(10), experts(10), {"kind": "train", "step": 10}, load(20), experts(20)]))
    assert log.name == "run"
    assert log.steps("load") == [10, 20]
    assert [record["step"] for record in log.records("train")] == [10]
    assert log.loads(20) == [[1.0, 2.0]]
    assert log.loads(15) is None
    assert log.config == {}
    assert RunLog(log.file).records("load") == log.records("load")
    with pytest.raises(ValueError, match="holds no run: there is no"):
        RunLog(tmp_path)


def test_many_records_are_chosen_evenly_with_the_last(tmp_path):
    log = RunLog(write(tmp_path, [load(10 * i) for i in range(1, 1001)]))
    steps = [record["step"] for record in log.records("load", most=10)]
    assert len(steps) == 10
    assert [record["step"] for record in log.records("load", most=1)] == [10_000]
    assert steps[-1] == 10_000
    assert steps == sorted(set(steps))
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 1120


def test_a_half_written_line_waits_and_a_damaged_one_is_counted(tmp_path):
    folder = write(tmp_path, [load(10)])
    file = folder / "metrics.jsonl"
    with file.open("a") as out:
        out.write('{"kind":"load","step":20,"st')
    log = RunLog(folder)
    assert log.steps("load") == [10]
    with file.open("a") as out:
        out.write('eps":10}\nnot a record\n\n' + json.dumps(load(30)) + "\n")
    assert log.refresh()
    assert log.steps("load") == [10, 20, 30]
    assert log.damaged == 1
    assert not log.refresh()
    with file.open("a") as out:
        out.write('{"kind":"load","step":40,"steps": oh}\n')
    log.refresh()
    assert [record["step"] for record in log.records("load")] == [10, 20, 30]
    assert log.damaged == 2


def test_a_resumed_run_counts_nothing_twice_whether_its_file_was_cut_or_not(tmp_path):
    first = [load(10), experts(10), load(20), experts(20), {"kind": "train", "step": 20}, load(30), experts(30)]
    folder = write(tmp_path, first)
    log = RunLog(folder)
    write(tmp_path, [load(20, value=1), experts(20), {"kind": "train", "step": 20}])
    log.refresh()
    assert [(record["step"], record.get("value")) for record in log.records("load")] == [(10, 0), (20, 1)]
    assert log.steps("experts") == [10, 20]
    assert log.steps("train") == [20]
    sink = JsonLines(folder / "metrics.jsonl")
    sink.forget_after(10, ("load", "experts"))
    sink.write(load(20, value=2))
    sink.close()
    log.refresh()
    assert [(record["step"], record.get("value")) for record in log.records("load")] == [(10, 0), (20, 2)]
    assert log.steps("train") == [20]


def test_alerts_that_are_not_over(tmp_path):
    def alert(step, state, expert=None):
        return {"kind": "alert", "step": step, "state": state, "alert": "x", "layer": "a", "expert": expert}

    log = RunLog(write(tmp_path, [alert(1, "raised"), alert(1, "raised", 3), alert(2, "cleared"), alert(3, "raised")]))
    assert [(record["step"], record["expert"]) for record in log.raised()] == [(1, 3), (3, None)]
