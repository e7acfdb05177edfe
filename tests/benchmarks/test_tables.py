"""Tables, plots and the check of a quick study, on records made up here."""

import json

import pytest

from benchmarks.study import agreement, tables
from benchmarks.study.records import paired, read_runs


def record(arm, seed, bits, max_vio=1.0, table="main", **job):
    result = {
        "bits_per_byte": bits,
        "swapped": {"0": bits, "10": bits + 0.1},
        "max_vio_batch": [max_vio - 0.5, max_vio + 0.5],
        "mutual_information": [None, None],
        "curve": [[1, 0.5, bits + 1], [2, 1.0, bits]],
    }
    setting = {"corpus": ["sotu"], "model": {"layers": 2}, "ssr": {"probability": 0.0}}
    return {"job": {"table": table, "arm": arm, "seed": seed, **setting, **job}, "result": result}


def image(arm, seed, accuracy, table="main"):
    job = {"table": table, "arm": arm, "seed": seed, "data": "digits"}
    return {"job": job, "result": {"accuracy": accuracy, "corrupted": {"noise": {"0.1": 0.5, "0.3": 0.3}}}}


def write(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_a_later_record_of_the_same_run_replaces_the_earlier(tmp_path):
    records = [
        record("ssr_rare", 0, 3.0),
        record("ssr_rare", 0, 2.0, ssr={"probability": 0.5}),
        record("ssr_rare", 1, 2.5),
    ]
    runs = read_runs(write(tmp_path / "r.jsonl", records))
    assert [(run.seed, run.value("bits_per_byte")) for run in runs] == [(0, 2.0), (1, 2.5)]
    assert runs[0].value("max_vio_batch") == 1.0 and runs[0].value("swapped", "10") == pytest.approx(2.1)


def test_a_line_that_is_no_record_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"line 1 .*'result'"):
        read_runs(write(tmp_path / "r.jsonl", [{"job": {}}]))


def test_differences_are_paired_by_seed(tmp_path):
    bits = {"none": (2.0, 3.0, 4.0), "ssr_rare": (1.9, 2.8, 3.7, 9.0)}
    records = [record(arm, seed, value) for arm, values in bits.items() for seed, value in enumerate(values)]
    runs = read_runs(write(tmp_path / "r.jsonl", records))
    found = paired(runs[3:], runs[:3], "bits_per_byte")
    # -0.1, -0.2, -0.3: standard deviation 0.1, over the root of three.
    assert (found.mean, found.error, found.seeds) == (pytest.approx(-0.2), pytest.approx(0.1 / 3**0.5), 3)
    assert found.significant
    assert not paired(runs[3:4], runs[:1], "bits_per_byte").significant


def test_tables_and_plots_of_language_and_image_records(tmp_path, capsys):
    runs = [record(arm, seed, 2 + seed + (arm == "ssr_rare")) for arm in ("none", "ssr_rare") for seed in range(2)]
    diverged = {"job": record("topk_gate", 0, 0)["job"], "result": {"diverged": True, "step": 3, "seconds": 1.0}}
    write(tmp_path / "lm.jsonl", [*runs, diverged])
    write(tmp_path / "pictures.jsonl", [image(arm, 0, 0.75) for arm in ("none", "ssr_rare")])
    tables.main(["--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert "## main: corpus sotu, layers 2" in text
    assert "| no balancing | 2 | 2.5000 ± 0.7071 | 2.6000 ± 0.7071 | 1.00 ± 0.00 |" in text
    assert "| SSR, p = 0.01 | 2 | +1.0000 ± 0.0000 |" in text
    assert "1, 1 diverged | - |" in text
    assert "source in expert" not in text  # nobody has it
    assert "| no balancing | 1 | 75.00 | 40.00 |" in text
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == [*(f"lm_main_1_{name}.png" for name in ("balance", "swapped", "time"))]


def test_no_results_say_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="run a study"):
        tables.main(["--results", str(tmp_path)])


@pytest.mark.parametrize(
    ("quick", "full", "says"),
    [
        ((0.1, 0.11), (0.2, 0.21, 0.22), "agree"),
        ((0.1, 0.11), (-0.2, -0.21, -0.22), "contradict"),
        ((0.1, -0.2), (-0.2, -0.21, -0.22), "open"),
        ((0.1, 0.11), (-0.2, 0.3, 0.0), "open"),
        ((0.1,), (-0.2, -0.21, -0.22), "open"),
    ],
)
def test_signs_must_agree_where_both_studies_are_sure(quick, full, says, tmp_path, capsys):
    files = []
    for table, gains in (("quick", quick), ("main", full)):
        records = [record("none", seed, 2.0, 1.5, table) for seed in range(len(gains))]
        records += [record("ssr_rare", seed, 2.0 + gain, 1.5, table) for seed, gain in enumerate(gains)]
        records += [record("topk_gate", 0, 5.0, 1.5, table)] if table == "main" else []
        files.append(str(write(tmp_path / f"{table}.jsonl", records)))
    if says == "contradict":
        with pytest.raises(SystemExit) as caught:
            agreement.main(files)
        assert caught.value.code == 1
    else:
        agreement.main(files)
    text = capsys.readouterr().out
    assert f"| {says} |" in text.splitlines()[2] and "TopKGate" not in text


def test_agreement_needs_two_arms_on_the_same_data(tmp_path):
    quick = write(tmp_path / "q.jsonl", [image("none", 0, 0.5, "quick"), image("ssr_rare", 0, 0.5, "quick")])
    full = write(tmp_path / "f.jsonl", [image("none", 0, 0.5)])
    with pytest.raises(SystemExit, match="no two arms"):
        agreement.main([str(quick), str(full)])
