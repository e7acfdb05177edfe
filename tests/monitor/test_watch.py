"""`ssr-monitor watch`: what it shows is what the JSON lines say, at every width, while a run goes on."""

import argparse
import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from ssr_deepspeed.monitor.sinks import JsonLines
from ssr_deepspeed.monitor.view import BLOCKS, distinct, heat, sparkline
from ssr_deepspeed.monitor.watch import Watched, add_arguments, frames, main

NOW = 1_000_000.0


def records(step, layers=3, experts=8, time=NOW - 30, shape="model.layers.{}.mlp.gate"):
    """A window's two records; layer i is the more uneven the larger i is, and more so at later steps."""
    figures, loads = {}, []
    for i in range(layers):
        figures[shape.format(i)] = {
            "max_vio": round(0.1 * i + step / 1000, 6),
            "drop_rate": round(0.01 * i + 0.002, 6),
            "dead_share": 1 / experts if i == layers - 1 else 0.0,
            "straggler": None if i == 0 else 1.0 + i / 8,
            "transport_share": 0.25,
        }
        loads.append([0.0 if i == layers - 1 else 1.0, 2.5, 0.4, *[1.0] * (experts - 3)])
    load = {"kind": "load", "step": step, "steps": 10, "time": time, "model": {}, "layers": figures}
    return [load, {"kind": "experts", "step": step, "load_over_mean": loads}]


def alert(step, state="raised", **more):
    found = {"alert": "max_vio", "layer": "model.layers.2.mlp.gate", "expert": None, "since": step - 10}
    figures = {"value": 2.5, "threshold": 2.0, "advice": "do something"}
    return {"kind": "alert", "step": step, "state": state, **found, **figures, **more}


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    sink = JsonLines(folder / "metrics.jsonl")
    for line in lines:
        sink.write(line)
    sink.close()
    return folder


def text_of(frame, width, **options):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, **options)
    console.print(frame)
    return console.export_text(styles=False)


def shown(folders, width=100, height=None, clock=lambda: NOW):
    runs = [Watched(folder) for folder in folders]
    return text_of(next(frames(runs, lambda: (width, height), clock)), width)


def test_where_the_time_goes_has_a_line_of_its_own(tmp_path):
    speed = {"tokens_per_second": 12.0, "mfu": 0.412, "data_wait_share": 0.0312, "gate_time_share": 0.12}
    train = {"kind": "train", "step": 20, **speed}
    lines = shown([write(tmp_path / "mine", [*records(20), train])], 60).splitlines()
    assert lines[1] == "  41.2% MFU  3.1% waiting for data  12.0% in gates"
    unknown = {**train, "mfu": None, "gate_time_share": None}
    lines = shown([write(tmp_path / "other", [*records(20), unknown])], 60).splitlines()
    assert lines[1] == "  3.1% waiting for data"


@pytest.mark.parametrize("width", [60, 100, 200])
def test_every_figure_is_that_of_the_last_window_at_every_width(tmp_path, width):
    train = {"kind": "train", "step": 20, "tokens_per_second": 12345.6}
    text = shown([write(tmp_path / "mine", [*records(10), *records(20), train, alert(20)])], width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("mine  step 20  12,346 tokens/s  last record 30 s ago")
    assert lines[1].startswith("! alert: max_vio of model.layers.2.mlp.gate since step 10")
    rows = [line.split() for line in lines if re.match(r"\d ", line) and "%" in line]
    expected = [
        [str(i), f"{0.1 * i + 0.02:.3f}", f"{i + 0.2:.1f}%", dead, f"{1 + i / 8:.2f}" if i else "-", "25%"]
        for i, dead in ((2, "12%"), (1, "0%"), (0, "0%"))
    ]
    assert [row[:6] for row in rows] == expected
    # Two windows of the worst layer on one scale, which ends at its last.
    assert rows[0][6] == sparkline([0.21, 0.22], 0.22, BLOCKS)
    loads = [line.split(" ", 1)[1].strip() for line in lines if re.match(r"\d ", line) and "%" not in line]
    assert loads == ["x█▂▅▅▅▅▅", "▅█▂▅▅▅▅▅", "▅█▂▅▅▅▅▅"]


def test_a_frame_fits_a_small_screen_with_the_worst_layers_and_bins_of_experts(tmp_path):
    folder = write(tmp_path / "wide", [*records(10, layers=61, experts=256), *(alert(10, expert=e) for e in range(9))])
    for width, height in ((60, 20), (100, 12), (40, 6)):
        text = shown([folder], width, height)
        lines = text.rstrip("\n").splitlines()
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        first = next(line for line in lines if "%" in line)
        assert first.startswith("60 ")
    text = shown([folder], 60, 20)
    assert "more alerts" in text
    assert re.search(r"and \d+ more layers", text)
    assert "5 a cell" in text
    both = shown([folder, write(tmp_path / "other", records(10))], 80, 24).splitlines()
    assert len(both) <= 24
    assert any(line.startswith("other  step 10") for line in both)
    assert "and 3 more runs" in shown([folder] * 4, 80, 8)


def test_a_run_that_goes_on_is_shown_frame_by_frame(tmp_path):
    folder, now, size = tmp_path / "live", [NOW], [(80, 24)]
    folder.mkdir()
    (folder / "config.json").write_text('{"steps": 40}')
    picture = frames([Watched(folder)], lambda: size[0], lambda: now[0])
    assert "live  waiting: nothing is written yet" in text_of(next(picture), 80)
    write(folder, [{"kind": "train", "step": 5, "tokens_per_second": 7.0}])
    text = text_of(next(picture), 80)
    assert "live  step 5 of 40  7 tokens/s" in text
    assert "no load report yet" in text
    write(folder, [*records(10), alert(10)])
    assert "! alert" in text_of(next(picture), 80)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"load","step":20,"st')
    assert "step 10 of 40" in text_of(next(picture), 80)
    write(folder, [*records(20), alert(20, "cleared")])  # as a resumed run does, without the half line
    size[0], now[0] = (60, 24), NOW - 3600
    text = text_of(next(picture), 60)
    assert "step 20 of 40" in text
    assert "last record 0 s ago" in text  # the clock went back an hour
    assert "! alert" not in text
    assert max(map(len, text.splitlines())) <= 60
    (folder / "metrics.jsonl").write_text("")
    write(folder, records(10))
    assert "step 10 of 40" in text_of(next(picture), 60)


def test_names_are_shown_as_they_are(tmp_path):
    hostile = "[red]a[/red]\x1b[2J\n.{}"
    folder = write(tmp_path / "[bold]run", [*records(10, shape=hostile), alert(10, layer="[link=x]\x07")])
    runs = [Watched(folder)]
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(next(frames(runs, lambda: (200, None), lambda: NOW)))
    text = console.file.getvalue()
    assert "[bold]run" in text
    assert "[link=x]\\x07" in text
    assert "\x07" not in text
    assert "\x1b[2J" not in text
    alone = shown([write(tmp_path / "one", records(10, layers=1, shape=hostile))], 200)
    assert "[red]a[/red]\\x1b[2J\\n.0" in alone
    assert distinct(["a.0.gate", "a.1.gate"]) == ["0", "1"]
    assert distinct(["a.0", "a.0.b"]) == ["a.0", "b"]
    assert distinct(["x", "x"]) == ["x", "x"]


def test_characters_say_what_colours_say():
    assert heat([0.0, 0.5, 1.0, 1.5, 2.0, 9.0, None], 99, BLOCKS).plain == "x▃▅▇██?"
    assert heat([1.0, 1.0, 0.0, 1.0, 3.5, 1.0], 3, BLOCKS).plain == "▅x█"
    assert sparkline([0.0, None, 0.5, 1.0], 1.0, BLOCKS) == "▁ ▅█"
    assert sparkline([0.0], 0.0, BLOCKS) == "▁"


def test_a_screen_without_block_characters_gets_ascii(tmp_path):
    folder = write(tmp_path / "mine", records(10))
    frame = next(frames([Watched(folder)], lambda: (40, 20), lambda: NOW, blocks=False))
    assert text_of(frame, 40).isascii()


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_one_frame_is_printed_and_a_folder_without_a_run_is_a_sentence(tmp_path, capsys):
    folder = write(tmp_path / "mine", [*records(10), *records(20)])
    assert main(arguments(folder, "--once")) == 0
    assert "mine  step 20" in capsys.readouterr().out
    assert main(arguments(folder / "metrics.jsonl", "--once")) == 0
    assert "metrics  step 20" in capsys.readouterr().out
    assert main(arguments(folder, tmp_path, "--once")) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        arguments(folder, "--interval", "0")


def test_a_frame_needs_no_torch(tmp_path):
    train = [{"kind": "train", "step": step, "tokens_per_second": 7.0} for step in (10, 20)]
    folder = write(tmp_path / "mine", [*records(10), *records(20), *train])
    code = (
        "import sys; from ssr_deepspeed.monitor.__main__ import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'deepspeed', 'matplotlib'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "watch", str(folder), "--once"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "mine  step 20  7 tokens/s" in result.stdout
