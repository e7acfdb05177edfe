"""The page as a person meets it: in a real browser, by mouse and keys, with what the screen shows."""

import json
import threading

import matplotlib
import numpy as np
import pytest
import torch

from ssr_deepspeed.monitor.__main__ import main
from ssr_deepspeed.monitor.names import METRICS
from ssr_deepspeed.monitor.records import RunLog
from ssr_deepspeed.monitor.serve import MonitorServer
from tests.chromium import BINARY, Browser
from tests.gloo import run_ranks
from tests.hosts.test_engine import _monitored
from tests.monitor.records import routes, write_load, write_run
from tests.monitor.test_report import alert, many

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no Chromium: apt-get install chromium")

CELLS = """[...document.querySelectorAll("#layers tbody tr")].map((row) =>
    Object.fromEntries([...row.cells].slice(1).map((cell) => [cell.dataset.metric, [cell.title, cell.textContent]])))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.size(1200, 900)
        yield browser


def show(browser, tmp_path, *runs):
    """Open the report of some runs; it must ask for nothing else and complain about nothing."""
    file = tmp_path / "report.html"
    assert main(["report", *map(str, runs), "-o", str(file)]) == 0
    browser.open(file.as_uri())
    quiet(browser, file.as_uri())


def quiet(browser, url):
    assert browser.complaints == []
    assert [request for request in browser.requests if request != url] == []


def text(browser, name):
    return browser.js(f"document.getElementById({json.dumps(name)}).innerText")


def place(browser, name):
    """Left, top, width and height of an element on the screen."""
    browser.js(f"document.getElementById({json.dumps(name)}).scrollIntoView({{block: 'center'}})")
    return browser.js(
        f"(({{x, y, width, height}}) => [x, y, width, height])"
        f"(document.getElementById({json.dumps(name)}).getBoundingClientRect())"
    )


def focus(browser, name):
    browser.js(f"document.getElementById({json.dumps(name)}).focus()")


def lines_at(folder, step):
    """The window's load record and loads as the run's JSON lines hold them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (load,) = [line for line in lines if line["kind"] == "load" and line["step"] == step]
    (experts,) = [line for line in lines if line["kind"] == "experts" and line["step"] == step]
    return load, experts["load_over_mean"]


def table_is_that_of(browser, folder, step):
    load, _ = lines_at(folder, step)
    rows = browser.js(CELLS)
    assert len(rows) == len(load["layers"])
    for row, figures in zip(rows, load["layers"].values(), strict=True):
        assert list(row) == list(METRICS)
        for metric, (whole, shown) in row.items():
            assert float(whole) == figures[metric]
            assert float(shown.replace(",", "")) == pytest.approx(figures[metric], rel=6e-4)


def map_is_that_of(browser, folder, step):
    """Every cell on the screen has the colour of its load, by another implementation of the colour map."""
    _, loads = lines_at(folder, step)
    x, y, _, _ = place(browser, "map")
    left, wide, high, above = browser.js("[map.left, map.wide, map.high, ABOVE]")
    pixels = browser.pixels()
    for layer, row in enumerate(loads):
        for expert, load in enumerate(row):
            # Beside the middle, where a dead expert's cross would be.
            found = pixels[int(y + above + (layer + 0.5) * high - 6), int(x + left + (expert + 0.5) * wide)]
            expected = np.array(matplotlib.colormaps["cividis"](min(load / 2, 1.0))[:3]) * 255
            assert np.abs(found - expected).max() <= 6, (layer, expert, load)


def test_the_slider_moves_through_the_windows_by_key_and_mouse(browser, tmp_path):
    folder = write_run(tmp_path / "mine", 40)
    show(browser, tmp_path, folder)
    assert "steps 36 to 40 (8 of 8)" in text(browser, "window-text")
    table_is_that_of(browser, folder, 40)
    map_is_that_of(browser, folder, 40)
    focus(browser, "window")
    browser.press("ArrowLeft", 2)
    assert "steps 26 to 30 (6 of 8)" in text(browser, "window-text")
    table_is_that_of(browser, folder, 30)
    map_is_that_of(browser, folder, 30)
    browser.press("Home")
    table_is_that_of(browser, folder, 5)
    x, y, width, height = place(browser, "window")
    browser.point(x + width * 3 / 7, y + height / 2, press=True)
    assert "(4 of 8)" in text(browser, "window-text")
    table_is_that_of(browser, folder, 20)
    map_is_that_of(browser, folder, 20)
    assert browser.complaints == []


def test_pointer_and_arrow_keys_tell_layer_expert_and_load(browser, tmp_path):
    folder = write_run(tmp_path / "mine", 20)
    show(browser, tmp_path, folder)
    _, loads = lines_at(folder, 20)
    x, y, _, _ = place(browser, "map")
    left, wide, high, above = browser.js("[map.left, map.wide, map.high, ABOVE]")
    browser.point(x + left + 5.5 * wide, y + above + 1.5 * high)
    assert text(browser, "cell").startswith("layer 1 (layers.1.gate), expert 5: load ")
    focus(browser, "map")
    browser.press("Home")
    for expert, load in enumerate(loads[1]):
        shown = text(browser, "cell").partition(f"expert {expert}: load ")[2]
        assert float(shown.split()[0]) == load
        browser.press("ArrowRight")
    browser.press("ArrowDown")  # the last layer has no such expert
    assert "layer 1" in text(browser, "cell")
    browser.press("ArrowUp")
    assert text(browser, "cell").startswith("layer 0 (layers.0.gate), expert 7")
    assert "expert 7: load" in browser.js("document.getElementById('map').getAttribute('aria-label')")


def test_curves_follow_the_chosen_layer_and_tell_their_values(browser, tmp_path):
    folder = write_run(tmp_path / "mine", 40)
    show(browser, tmp_path, folder)
    load, _ = lines_at(folder, 5)
    focus(browser, "chart-balance")
    browser.press("Home")
    shown = browser.js("document.querySelector('#chart-balance .readout').innerText")
    model = load["model"]["max_vio"]
    assert shown == f"step 5: mine, mean {model['mean']:.4g}, mine, worst layer {model['worst']:.4g}"
    focus(browser, "layer")
    browser.press("ArrowDown", 2)
    focus(browser, "metric")
    browser.press("End")
    focus(browser, "chart-balance")
    browser.press("Home")
    shown = browser.js("document.querySelector('#chart-balance .readout').innerText")
    assert shown == f"step 5: mine {load['layers']['layers.1.gate']['straggler']:.4g}"
    for name in ("loss", "balance", "drop", "change", "transport_share", "sweeps", "column_error", "rerouted"):
        assert browser.js(f"document.querySelectorAll('#chart-{name} svg[role=img] path').length") > 1
    assert browser.complaints == []


def test_two_runs_are_told_apart_and_compared(browser, tmp_path):
    runs = [write_run(tmp_path / "first", 20), write_run(tmp_path / "second", 30, experts=(8, 8), seed=1)]
    show(browser, tmp_path, *runs)
    assert "training loss\t20\t3.000 nats\t3.000 nats" in text(browser, "comparison")
    assert "optimizer steps\t20\t30" in text(browser, "summary")
    styles = browser.js(
        "[...document.querySelectorAll('#chart-balance .legend span')].map((one) => [one.innerText,"
        "...['stroke', 'stroke-dasharray'].map((name) => one.querySelector('line').getAttribute(name)),"
        "one.querySelector('path').getAttribute('d')])"
    )
    assert [one[0] for one in styles] == [f"{run}, {which}" for run in ("first", "second") for which in
                                          ("mean", "worst layer")]  # fmt: skip
    assert len({tuple(one[1:]) for one in styles}) == 4
    # Runs also without their colours, by marker; roles by dash.
    assert styles[0][3] != styles[2][3]
    assert styles[0][2] != styles[1][2]
    focus(browser, "run")
    browser.press("ArrowDown")
    table_is_that_of(browser, runs[1], 30)
    map_is_that_of(browser, runs[1], 30)
    assert browser.complaints == []


def test_hostile_names_are_text(browser, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    write_load(folder, (0, 10), layer=hostile + ".{}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**alert(10, "raised"), "layer": hostile, "advice": hostile}) + "\n")
    (folder / "config.json").write_text(json.dumps({hostile: hostile}))
    show(browser, tmp_path, folder, write_load(tmp_path / "@DATA@ $&", (0, 10)))
    assert "<img src=x onerror=alert(1)>" in text(browser, "title")
    assert hostile in text(browser, "alerts")
    assert browser.js("document.querySelector('#layer option:nth-child(2)').innerText") == f"{hostile}.0"
    assert browser.js("document.images.length + document.scripts.length") == 2
    assert browser.complaints == []


def test_a_run_with_load_records_only_and_one_without(browser, tmp_path):
    folder = write_load(tmp_path / "engine", (0, 10), experts=(8,), sweeps=None, straggler=None)
    show(browser, tmp_path, folder / "metrics.jsonl")
    assert browser.js("document.getElementById('chart-loss').hidden")
    assert browser.js("document.getElementById('chart-sweeps').hidden")
    assert "None was raised" in text(browser, "alerts")
    map_is_that_of(browser, folder, 10)
    (folder / "metrics.jsonl").write_text('{"kind":"train","step":5,"tokens":9,"loss":null,"seconds":1}\n')
    show(browser, tmp_path, folder)
    assert "no window was recorded yet" in text(browser, "window-text")
    assert "No expert loads were recorded" in browser.js("document.body.innerText")


@pytest.mark.parametrize("width", [400, 900, 1600])
def test_the_page_fits_the_window_and_can_be_read(browser, tmp_path, width):
    browser.size(width, 900)
    runs = [write_run(tmp_path / name, 40) for name in ("first", "a_rather_long_name_of_the_second_run")]
    show(browser, tmp_path, *runs)
    assert browser.js("document.documentElement.scrollWidth <= window.innerWidth")
    sizes = browser.js("[...document.querySelectorAll('body *')].map((e) => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12
    boxes = browser.js(
        "[...document.querySelectorAll('figure:not([hidden]), #map, #scale')].map((e) => e.getBoundingClientRect())"
        ".map(({left, right, width}) => [left, right, width])"
    )
    assert all(left >= 0 and right <= width and wide >= 230 for left, right, wide in boxes)
    # Text of charts stays inside its chart.
    assert browser.js(
        "[...document.querySelectorAll('figure > svg')].every((svg) => [...svg.querySelectorAll('text')].every((t) =>"
        "t.getBoundingClientRect().left >= svg.getBoundingClientRect().left - 1 &&"
        "t.getBoundingClientRect().right <= svg.getBoundingClientRect().right + 1))"
    )
    browser.size(1200, 900)


def luminance(colours):
    """Relative luminance as WCAG defines it, of `[N, 3]` from 0 to 1."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_colours_are_safe_for_colour_blind_readers_and_stand_out(browser, tmp_path):
    show(browser, tmp_path, write_load(tmp_path / "run", (0, 5)))
    shares = np.linspace(0, 1, 40)
    found = browser.js(f"{shares.tolist()}.map((share) => cividis(share).match(/\\d+/g).map(Number))")
    expected = matplotlib.colormaps["cividis"](shares)[:, :3]
    np.testing.assert_allclose(np.array(found) / 255, expected, atol=0.02)
    assert (np.diff(luminance(np.array(found) / 255)) > 0).all()
    lines = browser.js("COLOURS")
    okabe_ito = {"#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"}
    assert set(lines) <= okabe_ito
    contrast = 1.05 / (luminance(np.array([matplotlib.colors.to_rgb(one) for one in lines])) + 0.05)
    assert contrast[:4].min() >= 3
    for name in ("--ink", "--soft"):
        ink = browser.js(f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()")
        assert 1.05 / (luminance(np.array([matplotlib.colors.to_rgb(ink)]))[0] + 0.05) >= 4.5


def test_the_page_of_an_engines_run_shows_an_independent_count_of_its_routes(browser, tmp_path):
    path = tmp_path / "load.jsonl"
    (counted, _), _ = run_ranks(2, _monitored, str(path), True, folder=tmp_path)
    show(browser, tmp_path, path)
    assert "steps 4 to 6 (2 of 2)" in text(browser, "window-text")
    focus(browser, "window")
    browser.press("Home")
    focus(browser, "map")
    for layer in range(2):
        load = counted[:3, layer].sum(0)
        browser.press("Home")
        for expected in (load / load.mean()).tolist():
            shown = float(text(browser, "cell").partition(": load ")[2].split()[0])
            assert shown == pytest.approx(expected, abs=1e-3)
            browser.press("ArrowRight")
        browser.press("ArrowDown")
    by_step = counted[:3].max(2).values / counted[:3].mean(2) - 1
    shown = torch.tensor([float(row["max_vio"][0]) for row in browser.js(CELLS)])
    torch.testing.assert_close(shown, by_step.mean(0), atol=1e-5, rtol=0)


def test_the_served_page_follows_the_run_and_keeps_the_slider_where_it_is(browser, tmp_path):
    folder = write_load(tmp_path / "run", (0, 20))
    with MonitorServer([RunLog(folder)], port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            browser.open(server.url)
            browser.until("data !== null")
            table_is_that_of(browser, folder, 20)
            write_load(folder, (20, 25))
            browser.until("document.getElementById('window').max === '4'")
            table_is_that_of(browser, folder, 25)
            map_is_that_of(browser, folder, 25)
            focus(browser, "window")
            browser.press("ArrowLeft", 3)
            write_load(folder, (25, 30))
            browser.until("document.getElementById('window').max === '5'")
            assert "steps 6 to 10 (2 of 6)" in text(browser, "window-text")
            table_is_that_of(browser, folder, 10)
            assert browser.js("document.activeElement.id") == "window"
            assert browser.complaints == []
            assert set(browser.requests) == {server.url, f"{server.url}data.json"}
        finally:
            browser.open("about:blank")
            server.shutdown()


@pytest.mark.slow
def test_the_page_of_a_long_run_of_a_large_model_can_be_used(browser, tmp_path):
    run, _, _ = many(tmp_path, 10_000, 64, 256)
    browser.open((tmp_path / "report.html").as_uri())
    focus(browser, "window")
    browser.press("Home")
    assert f"(1 of {len(run['frames']['places'])})" in text(browser, "window-text")
    focus(browser, "map")
    browser.press("End")
    browser.press("ArrowDown", 63)
    load = routes(0, 63, 256)
    shown = float(text(browser, "cell").partition("expert 255: load ")[2].split()[0])
    assert shown == pytest.approx(load[255] * 256 / sum(load), abs=1e-3)
    assert browser.complaints == []
