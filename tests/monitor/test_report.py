import json
import re

import pytest

from ssr_deepspeed.monitor.report import read_run, transport_share, write_report
from ssr_deepspeed.monitor.sinks import JsonLines, keep_records, read_json_lines


def load_record(step, shares, transport=0.0):
    layers = {
        f"layers.{i}.gate": {
            "max_vio": max(share) * len(share) - 1,
            "max_vio_window": 0.1,
            "min_vio": -0.2,
            "cv": 0.3,
            "effective_experts": 0.9,
            "dead_share": 0.0,
            "drop_rate": 0.05,
            "transport_share": transport,
            "column_error": None,
            "load": share,
        }
        for i, share in enumerate(shares)
    }
    return {"kind": "load", "step": step, "steps": 5, "layers": layers}


def write_run(folder, name, steps, final_bits=2.5):
    home = folder / name
    sink = JsonLines(home / "metrics.jsonl")
    for step in range(5, steps + 1, 5):
        sink.write(load_record(step, [[0.4, 0.3, 0.2, 0.1], [0.25] * 4], transport=1.0 if step == 5 else 0.0))
        sink.write({"kind": "train", "step": step, "tokens": step * 100, "loss": 5 - step / 10, "learning_rate": 1e-3,
                    "gradient_norm": None, "tokens_per_second": 1000.0, "seconds": step})  # fmt: skip
        sink.write({"kind": "evaluation", "step": step, "final": False, "bits_per_byte": 4 - step / 10,
                    "nats_per_token": 3 - step / 10, "tokens": 99, "max_vio": [0.6, 0.0]})  # fmt: skip
    sink.write({"kind": "evaluation", "step": steps, "final": True, "bits_per_byte": final_bits,
                "nats_per_token": 1.7, "tokens": 12345, "max_vio": [0.61, 0.02]})  # fmt: skip
    sink.close()
    (home / "config.json").write_text(json.dumps({"data": {"sequence_length": 64}, "deepspeed": {}}))
    return home


def cells(page):
    rows = re.findall(r"<tr><th scope='row'>(.*?)</th>(.*?)</tr>", page)
    return {name: re.findall(r"<td>(.*?)</td>", rest) for name, rest in rows}


def test_the_page_shows_the_runs_own_figures_and_needs_nothing_else(tmp_path):
    page = write_report(write_run(tmp_path, "mine", 20)).read_text()
    found = cells(page)
    assert found["held-out bits per byte"] == ["2.500 (12,345 tokens)"]
    assert found["held-out MaxVio by layer"] == ["0.61, 0.02"]
    assert found["training MaxVio by layer (last window)"] == ["0.60, 0.00"]
    assert found["share of transport steps"] == ["25.0 %"]
    assert found["training tokens"] == ["2,000"]
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)\s*=\s*[\"'](https?:)?//", page)
    for name in ("loss.png", "load.png"):
        assert (tmp_path / "mine" / name).read_bytes().startswith(b"\x89PNG")


def test_runs_are_compared_at_the_last_step_that_both_have(tmp_path):
    mine, other = write_run(tmp_path, "mine", 20), write_run(tmp_path, "other", 10)
    page = write_report(mine, [other]).read_text()
    part = page[page.index("At step 10") : page.index("<h2>Loss")]
    found = cells(part)
    assert found["training loss"] == ["4.000 nats"] * 2
    assert found["held-out bits per byte"] == ["3.000 (99 tokens)"] * 2


def test_names_are_escaped(tmp_path):
    page = write_report(write_run(tmp_path, "<script>alert(1)</script>", 5)).read_text()
    assert "<script>" not in page


def test_a_run_without_monitor_or_evaluation_still_has_a_report(tmp_path):
    home = write_run(tmp_path, "mine", 5)
    kept = [record for record in read_json_lines(home / "metrics.jsonl") if record["kind"] == "train"]
    (home / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert "The load monitor was off" in write_report(home).read_text()


@pytest.mark.parametrize(
    ("remove", "words"), [("config.json", "no config.json"), ("metrics.jsonl", "no metrics.jsonl")]
)
def test_a_folder_without_a_run_is_refused(tmp_path, remove, words):
    home = write_run(tmp_path, "mine", 5)
    (home / remove).unlink()
    with pytest.raises(ValueError, match=words):
        read_run(home)


def test_a_half_written_last_line_is_left_out_and_any_other_is_an_error(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_json_lines(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_json_lines(file)


def test_a_half_written_last_line_does_not_spoil_what_comes_after(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"step": 1}\n{"ste')
    sink = JsonLines(file)
    sink.write({"step": 2})
    sink.close()
    assert read_json_lines(file) == [{"step": 1}, {"step": 2}]


def test_records_that_are_not_wanted_are_dropped(tmp_path):
    file = tmp_path / "x.jsonl"
    keep_records(file, lambda record: record["step"] <= 2)
    assert not file.exists()
    file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + '{"st')
    keep_records(file, lambda record: record["step"] <= 2)
    assert read_json_lines(file) == [{"step": 1}, {"step": 2}]


def test_the_transport_share_weighs_windows_by_their_steps():
    first, second = load_record(30, [[0.5, 0.5]], 1.0), load_record(40, [[0.5, 0.5]], 0.0)
    first["steps"], second["steps"] = 30, 10
    assert transport_share([first, second]) == 0.75
    assert transport_share([]) is None
