import pytest

from ssr_deepspeed.monitor import sinks
from ssr_deepspeed.monitor.sinks import JsonLines, keep_records, read_json_lines
from tests.disks import files_limited_to


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
    # A full disk may leave half a record anywhere.
    file.write_text('{"step": 1}\n{"st{"step": 9}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_records(file, lambda record: record["step"] <= 2)
    assert read_json_lines(file) == [{"step": 1}, {"step": 2}]


def test_a_full_disk_delays_records_and_leaves_no_half_line_for_another_writer(tmp_path):
    """As a run's own records and its loads, which two writers append to one file."""
    file = tmp_path / "x.jsonl"
    one, other = JsonLines(file), JsonLines(file)
    one.write({"kind": "train", "step": 1})
    with files_limited_to(file.stat().st_size + 40):
        with pytest.raises(OSError, match="File too large"):
            one.write({"kind": "train", "step": 2}, {"kind": "train", "step": 3})
        with pytest.raises(OSError, match="File too large"):
            one.write({"kind": "train", "step": 4})
        assert [record["step"] for record in read_json_lines(file)] == [1, 2]
        assert file.read_bytes().endswith(b"}\n")
    other.write({"kind": "load", "step": 4})
    one.forget_after(3, ["train"])  # what waits, too
    one.write({"kind": "train", "step": 4, "again": True})
    assert [(record["kind"], record["step"]) for record in read_json_lines(file)] == [
        ("train", 1),
        ("train", 2),
        ("load", 4),
        ("train", 3),
        ("train", 4),
    ]


def test_what_waits_is_written_at_the_end_and_is_not_kept_without_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "_MOST_WAITING", 3)
    sink = JsonLines(tmp_path / "x.jsonl")
    with files_limited_to(0):
        for step in range(5):
            with pytest.raises(OSError, match="File too large"):
                sink.write({"step": step})
    sink.close()
    assert read_json_lines(tmp_path / "x.jsonl") == [{"step": 2}, {"step": 3}, {"step": 4}]


def test_a_folder_that_is_gone_for_a_while_delays_records_as_well(tmp_path):
    file, away = tmp_path / "run" / "x.jsonl", tmp_path / "away"
    sink = JsonLines(file)
    sink.write({"step": 1})
    file.parent.rename(away)
    for step in (2, 3):
        with pytest.raises(FileNotFoundError):
            sink.write({"step": step})
    away.rename(file.parent)
    sink.write({"step": 4})
    assert [record["step"] for record in read_json_lines(file)] == [1, 2, 3, 4]
