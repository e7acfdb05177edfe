import pytest

from ssr_deepspeed.monitor.sinks import JsonLines, keep_records, read_json_lines


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
