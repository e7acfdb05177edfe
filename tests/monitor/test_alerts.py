import pytest

from ssr_deepspeed.config import AlertConfig, SSRConfig
from ssr_deepspeed.monitor.alerts import ADVICE, Alerts, sentence
from ssr_deepspeed.monitor.records import RunLog
from ssr_deepspeed.monitor.sinks import JsonLines

GOOD = {
    "drop_rate": 0.0,
    "max_vio": 0.1,
    "straggler": None,
    "unconverged": None,
    "router_entropy": 0.8,
    "nonfinite": 0.0,
}


def report(step, load=(0.25, 0.25, 0.25, 0.25), **figures):
    return {
        "step": step,
        "steps": 10,
        "layers": {"a": {**GOOD, **figures, "load": list(load)}, "b": {**GOOD, "load": [1.0]}},
    }


def kinds(records):
    return [
        (record["state"], record["alert"], record["layer"], record["expert"], record["since"]) for record in records
    ]


@pytest.mark.parametrize(
    ("figure", "bad", "almost", "good"),
    [
        ("drop_rate", 0.11, 0.095, 0.09),
        ("max_vio", 2.1, 1.9, 1.8),
        ("straggler", 1.6, 1.4, 1.3),
        ("unconverged", 0.6, 0.46, 0.45),
        ("router_entropy", 0.04, 0.052, 0.056),
        ("nonfinite", 0.01, 0.001, 0.0),
    ],
)
def test_a_figure_beyond_its_threshold_is_said_once_and_once_when_it_is_back(figure, bad, almost, good):
    alerts = Alerts(AlertConfig())
    found = [
        alerts.judge(report(10 * (i + 1), **{figure: x})) for i, x in enumerate([good, bad, bad, almost, good, good])
    ]
    assert [kinds(records) for records in found] == [
        [], [("raised", figure, "a", None, 10)], [], [], [("cleared", figure, "a", None, 10)], [],
    ]  # fmt: skip
    assert found[1][0]["value"] == bad
    words = sentence(found[1][0])
    assert words.startswith(f"alert: {figure} of a since step 10: {figure} ")
    assert words.endswith(f"try: {ADVICE[figure]}")
    assert sentence(found[4][0]).startswith(f"alert over: {figure} of a (since step 10")


def test_a_dead_expert_is_named_after_that_many_windows_in_a_row_with_the_step_since_when():
    alerts = Alerts(AlertConfig(dead_windows=3))
    dead, alive = (0.5, 0.0, 0.25, 0.25), (0.4, 0.1, 0.25, 0.25)
    loads = [dead, dead, alive, dead, dead, dead, dead, alive]
    found = [kinds(alerts.judge(report(10 * (i + 1), load))) for i, load in enumerate(loads)]
    assert found[:5] == [[]] * 5
    assert found[5] == [("raised", "dead_expert", "a", 1, 30)]
    assert found[6:] == [[], [("cleared", "dead_expert", "a", 1, 30)]]


def test_a_resumed_run_neither_repeats_an_alert_nor_forgets_it():
    first = Alerts(AlertConfig())
    written = first.judge(report(10, drop_rate=0.5)) + first.judge(report(20, drop_rate=0.5, max_vio=3.0))
    written += first.judge(report(30, drop_rate=0.5))
    resumed = Alerts(AlertConfig())
    resumed.take(written)
    assert kinds(resumed.raised) == [("raised", "drop_rate", "a", None, 0)]
    assert resumed.judge(report(40, drop_rate=0.5)) == []
    assert kinds(resumed.judge(report(50))) == [("cleared", "drop_rate", "a", None, 0)]


def test_thresholds_are_the_configurations_and_none_is_silent():
    block = {"monitor": {"alerts": {"dead_windows": 0, "drop_rate": None, "max_vio": 5.0}}}
    alerts = Alerts(SSRConfig.from_dict(block).monitor.alerts)
    found = [alerts.judge(report(10 * i, (1.0, 0.0, 0.0, 0.0), drop_rate=0.9, max_vio=3.0)) for i in range(1, 6)]
    assert found == [[]] * 5
    assert kinds(alerts.judge(report(60, max_vio=5.1))) == [("raised", "max_vio", "a", None, 50)]
    with pytest.raises(ValueError, match=r"ssr.monitor.alerts.dead_windows = -1; allowed: at least 0"):
        SSRConfig.from_dict({"monitor": {"alerts": {"dead_windows": -1}}})
    with pytest.raises(ValueError, match=r"did you mean 'drop_rate'"):
        SSRConfig.from_dict({"monitor": {"alerts": {"drop_rat": 1}}})


def test_readers_of_the_records_find_what_is_raised(tmp_path):
    alerts, sink = Alerts(AlertConfig()), JsonLines(tmp_path / "metrics.jsonl")
    for record in alerts.judge(report(10, drop_rate=0.5, max_vio=3.0)) + alerts.judge(report(20, max_vio=3.0)):
        sink.write(record)
    sink.close()
    log = RunLog(tmp_path)
    assert log.damaged == 0
    assert log.raised() == alerts.raised
    assert kinds(log.raised()) == [("raised", "max_vio", "a", None, 0)]
