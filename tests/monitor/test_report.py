import base64
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from ssr_deepspeed.monitor.__main__ import main
from ssr_deepspeed.monitor.figures import transport_share
from ssr_deepspeed.monitor.names import METRICS
from ssr_deepspeed.monitor.sinks import JsonLines, keep_records, load_records, read_json_lines
from tests.monitor.records import load_report, routes, write_load, write_run


def data_of(file):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    return json.loads(text)


def report(tmp_path, *runs):
    assert main(["report", *map(str, runs), "-o", str(tmp_path / "report.html")]) == 0
    return data_of(tmp_path / "report.html")


def loads_of(frames):
    """Load of every frame, layer by layer, as the page's script decodes it."""
    whole = np.frombuffer(base64.b64decode(frames["loads"]), "<u2").reshape(len(frames["places"]), -1)
    return np.where(whole == 65535, np.nan, whole / frames["scale"])


def test_the_page_holds_the_records_own_figures_and_needs_nothing_else(tmp_path):
    folder = write_run(tmp_path / "mine", 20)
    (run,) = report(tmp_path, folder)["runs"]
    figures = dict(run["summary"])
    assert figures["held-out bits per byte"] == "2.500 (12,345 tokens)"
    assert figures["held-out MaxVio by layer"] == "0.61, 0.02"
    assert figures["training tokens"] == "2,000"
    assert figures["training loss (last record)"] == "3.000 nats"
    lines = read_json_lines(folder / "metrics.jsonl")
    windows = [line for line in lines if line["kind"] == "load"]
    assert run["windows"] == [5, 10, 15, 20]
    assert run["layers"] == list(windows[0]["layers"])
    for metric in METRICS:
        for place, window in enumerate(windows):
            by_layer = [one[metric] for one in window["layers"].values()]
            assert [row[place] for row in run["by_layer"][metric]] == by_layer
            assert run["model"][metric]["mean"][place] == window["model"][metric]["mean"]
            worst = window["layers"][run["layers"][run["model"][metric]["layer"][place]]][metric]
            assert run["model"][metric]["worst"][place] == worst
    for loads, step in zip(loads_of(run["frames"]), run["windows"], strict=True):
        counts = [np.array(routes(step, layer, width)) for layer, width in enumerate((8, 8, 4))]
        np.testing.assert_allclose(loads, np.concatenate([one / one.mean() for one in counts]), atol=6e-4)
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", (tmp_path / "report.html").read_text())


def test_the_summary_tells_where_the_time_went_where_the_records_do(tmp_path):
    folder = write_run(tmp_path / "mine", 20)
    (run,) = report(tmp_path, folder)["runs"]
    assert not [name for name, _ in run["summary"] if "waiting" in name or "gates" in name or "memory" in name]
    sink = JsonLines(folder / "metrics.jsonl")
    for step, wait in ((25, 0.01), (30, 0.5), (35, 0.02)):
        sink.write({"kind": "train", "step": step, "loss": 1.0, "mfu": None, "data_wait_share": wait,
                    "gate_time_share": wait / 2, "peak_memory_bytes": 3 * 2**29 + step})  # fmt: skip
    sink.close()
    (run,) = report(tmp_path, folder)["runs"]
    figures = dict(run["summary"])
    assert figures["time waiting for data (median)"] == "2.0 %"
    assert figures["time in gates, forwards (median)"] == "1.0 %"
    assert figures["peak memory of a rank"] == "1.50 GiB"
    assert "model FLOP/s utilisation (median)" not in figures


def test_runs_are_compared_at_the_last_step_that_all_have(tmp_path):
    runs = [write_run(tmp_path / "a" / "run", 20), write_run(tmp_path / "b" / "run", 10)]
    data = report(tmp_path, *runs)
    assert [run["name"] for run in data["runs"]] == list(map(str, runs))
    rows = {row["figure"]: (row["step"], row["values"]) for row in data["comparison"]}
    assert rows["training loss"] == (10, ["4.000 nats"] * 2)
    assert rows["held-out bits per byte (part)"] == (10, ["3.000 (99 tokens)"] * 2)
    assert "held-out bits per byte" not in rows
    assert report(tmp_path, runs[0])["comparison"] == []


def test_a_run_without_training_records_or_without_monitor_still_has_a_page(tmp_path):
    (run,) = report(tmp_path, write_load(tmp_path / "load", (0, 10)) / "metrics.jsonl")["runs"]
    assert (run["name"], run["config"], run["train"]["step"], run["windows"]) == ("metrics", {}, [], [5, 10])
    folder = write_run(tmp_path / "mine", 5)
    keep_records(folder / "metrics.jsonl", lambda record: record["kind"] == "train")
    (run,) = report(tmp_path, folder)["runs"]
    assert (run["windows"], run["layers"], run["by_layer"], run["train"]["loss"]) == ([], [], {}, [4.5])


def test_a_resumed_run_with_a_half_written_line_shows_each_window_once(tmp_path):
    folder = write_load(tmp_path / "run", (0, 20))
    write_load(folder, (10, 25), seed=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"load","step":30,"ste')
    (run,) = report(tmp_path, folder)["runs"]
    assert run["windows"] == [5, 10, 15, 20, 25]
    seeds = [load_report(step, [[1, 2]], seed=int(step > 10)) for step in run["windows"]]
    assert run["by_layer"]["cv"][0] == [one["layers"]["layers.0.gate"]["cv"] for one in seeds]


def test_loads_that_are_unknown_or_large_or_of_another_model_are_kept_apart(tmp_path):
    sink = JsonLines(tmp_path / "run" / "metrics.jsonl")
    one_expert = [1] + [0] * 255
    for step, loads in ((5, [[1, 2]]), (10, [one_expert, [1] * 8]), (15, [[1] * 256, [3] + [1] * 7])):
        for record in load_records(load_report(step, loads)):
            if step == 15 and record["kind"] == "experts":
                record["load_over_mean"][1][0] = None
            sink.write(record)
    sink.close()
    (run,) = report(tmp_path, tmp_path / "run")["runs"]
    assert run["windows"] == [5, 10, 15]
    assert run["frames"]["places"] == [1, 2]
    assert run["frames"]["experts"] == [256, 8]
    loads = loads_of(run["frames"])
    assert loads[0, 0] == pytest.approx(256, abs=0.1)
    assert np.isnan(loads[1, 256])
    assert loads[1, 0] == 1


def test_clocks_that_jump_change_nothing_but_the_time_that_is_told(tmp_path):
    sink = JsonLines(tmp_path / "run" / "metrics.jsonl")
    for step, clock, date in (
        (5, 1.8e9, "2027-01-15 08:00:00 UTC"),
        (10, 1e9, "2001-09-09 01:46:40 UTC"),
        (15, 1e300, "-"),
    ):
        for record in load_records({**load_report(step, [[1, 2]]), "time": clock}):
            sink.write(record)
        (run,) = report(tmp_path, tmp_path / "run")["runs"]
        assert run["windows"] == list(range(5, step + 1, 5))
        assert dict(run["summary"])["last window written"] == date
    sink.close()


def alert(step, state, expert=None):
    return {"kind": "alert", "step": step, "state": state, "alert": "max_vio", "layer": "a", "expert": expert,
            "since": step - 5, "value": 3.0, "threshold": 2.0, "advice": "balance"}  # fmt: skip


def test_alerts_are_listed_once_the_open_ones_first(tmp_path):
    folder = write_load(tmp_path / "run", (0, 5))
    sink = JsonLines(folder / "metrics.jsonl")
    for record in (alert(5, "raised"), alert(10, "raised", 3), alert(15, "cleared"), alert(20, "raised", 4)):
        sink.write(record)
    sink.close()
    (run,) = report(tmp_path, folder)["runs"]
    assert [(row["expert"], row["over"]) for row in run["alerts"]] == [(4, None), (3, None), (None, 15)]
    assert dict(run["summary"])["alerts that are not over"] == "2"


def test_names_cannot_become_markup(tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    folder = write_load(tmp_path / "run", (0, 5), layer=hostile + ".{}")
    (run,) = report(tmp_path, folder)["runs"]
    assert run["layers"][0] == hostile + ".0"
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_pictures_are_written_on_request(tmp_path):
    folder = write_run(tmp_path / "$mine$", 10)
    assert main(["report", str(folder), "--png", str(tmp_path / "png")]) == 0
    assert (folder / "report.html").exists()
    for name in ("loss.png", "load.png"):
        assert (tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_a_folder_without_a_run_and_starts_without_torch(tmp_path):
    code = (
        "import sys; from ssr_deepspeed.monitor.__main__ import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'matplotlib'} & set(sys.modules); sys.exit(status)"
    )
    for command in ("report", "serve"):
        result = subprocess.run(
            [sys.executable, "-c", code, command, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert result.stderr.startswith(f"ssr-monitor: {tmp_path} holds no run")
        assert result.stderr.count("\n") == 1


def write_many(file, windows, layers, experts):
    """A long run from one window's records, whose steps alone differ."""
    report, loads = load_records(load_report(0, [routes(0, layer, experts) for layer in range(layers)]))
    tails = [json.dumps(record, separators=(",", ":")).split('"step":0', 1)[1] for record in (report, loads)]
    with file.open("w") as out:
        for step in range(1, windows + 1):
            out.write(f'{{"kind":"load","step":{step}{tails[0]}\n{{"kind":"experts","step":{step}{tails[1]}\n')


def many(tmp_path, windows, layers, experts):
    write_many(tmp_path / "metrics.jsonl", windows, layers, experts)
    began = time.process_time()  # of this process: the machine may have other work
    (run,) = report(tmp_path, tmp_path)["runs"]
    seconds, size = time.process_time() - began, (tmp_path / "report.html").stat().st_size
    return run, seconds, size


def test_a_long_run_is_shown_in_part_with_its_last_window(tmp_path):
    run, _, size = many(tmp_path, 3000, 2, 64)
    assert len(run["windows"]) == 1000
    assert run["windows"][-1] == 3000
    assert run["windows"] == sorted(set(run["windows"]))
    assert run["notes"] == ["1,000 of 3,000 windows are shown, evenly chosen, the last among them."]
    assert run["frames"]["places"][-1] == 999
    assert size < 2_000_000


@pytest.mark.slow
def test_ten_thousand_windows_of_64_layers_with_256_experts(tmp_path):
    run, seconds, size = many(tmp_path, 10_000, 64, 256)
    print(f"{seconds:.1f} s, {size / 1e6:.1f} MB")
    assert run["windows"][-1] == 10_000
    assert len(run["windows"]) == 1000
    assert 100 <= len(run["frames"]["places"]) <= 200
    assert seconds < 20
    assert size < 30e6


def test_the_transport_share_weighs_windows_by_their_steps():
    first, second = (load_report(step, [[1, 1]], transport_share=share) for step, share in ((30, 1.0), (40, 0.0)))
    first["steps"], second["steps"] = 30, 10
    assert transport_share([first, second]) == 0.75
    assert transport_share([]) is None
