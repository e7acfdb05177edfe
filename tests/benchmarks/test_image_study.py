"""The image study: its data and corruptions, its model, and one tiny run of everything."""

import gzip
import io
import json
import math
import os
import zipfile

import numpy as np
import pytest
import torch

from benchmarks.image_study import MODEL, batches, study_jobs, summary, work
from benchmarks.study import images
from benchmarks.study.arms import ARMS, COMPARED
from benchmarks.study.fetch import Package
from benchmarks.study.images import CORRUPTIONS, LEVELS, box_blur, corrupt, load_images, occlude, read_idx
from tests.gloo import run_ranks


def test_idx_files_are_read_with_their_shape_and_refused_when_cut_short(tmp_path):
    path = tmp_path / "images.gz"
    header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (2, 2, 3))
    path.write_bytes(gzip.compress(header + bytes(range(12))))
    assert torch.equal(read_idx(path), torch.arange(12, dtype=torch.uint8).view(2, 2, 3))
    path.write_bytes(gzip.compress(header + bytes(11)))
    with pytest.raises(ValueError, match="not a whole idx file"):
        read_idx(path)


@pytest.mark.parametrize("name", images.NAMES)
def test_data_that_cannot_be_fetched_say_what_to_run_and_where_the_file_goes(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for package in ("_FASHION", "_DIGITS"):
        monkeypatch.setattr(images, package, Package(("false", "thing"), "thing-*"))
    with pytest.raises(ValueError, match=rf"run `false thing` by hand .*{tmp_path}/ssr_deepspeed/study"):
        load_images.__wrapped__(name)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_box_blur_is_the_mean_of_the_reflected_neighbourhood():
    pixels = torch.tensor([[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]])
    # Reflected at the corner: rows and columns 2 1 2.
    assert box_blur(pixels, 3)[0, 0, 0] == pytest.approx((5 + 4 + 5 + 2 + 1 + 2 + 5 + 4 + 5) / 9)
    assert box_blur(pixels, 3)[0, 1, 1] == 5
    assert box_blur(pixels, 2)[0, 0, 0] == (1 + 2 + 4 + 5) / 4


def test_contrast_shrinks_about_each_images_mean():
    pixels = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.2, 0.2], [0.2, 0.6]]])
    expected = torch.tensor([[[0.25, 0.75], [0.75, 0.25]], [[0.25, 0.25], [0.25, 0.45]]])
    torch.testing.assert_close(corrupt(pixels, "contrast", 1), expected)


def test_noise_has_its_standard_deviation_and_stays_in_the_pixel_range():
    grey = torch.full((50, 28, 28), 0.5)
    assert (corrupt(grey, "noise", 1) - grey).std() == pytest.approx(0.1, rel=0.02)
    strong = corrupt(grey, "noise", 3)
    assert strong.min() == 0
    assert strong.max() == 1


@pytest.mark.parametrize(("side", "sizes"), [(28, (7, 10, 14)), (8, (2, 3, 4))])
def test_occlusion_covers_one_grey_square_inside_each_image(side, sizes):
    black = torch.zeros(40, side, side)
    for level, size in zip(LEVELS, sizes, strict=True):
        covered = corrupt(black, "occlusion", level) == 0.5
        assert (covered.sum((1, 2)) == size * size).all()
        assert (covered.any(1).sum(1) == size).all()
    corners = occlude(black, size, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    assert corners.unique().numel() > 5


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_repeat_and_leave_their_input_alone(kind):
    pixels = torch.rand(4, 28, 28)
    before = pixels.clone()
    torch.rand(3)
    first = corrupt(pixels, kind, 2)
    torch.rand(5)
    assert torch.equal(first, corrupt(pixels, kind, 2))
    assert torch.equal(pixels, before)
    with pytest.raises(ValueError, match="levels 1 to 3"):
        corrupt(pixels, kind, 4)


def test_every_epoch_shows_every_image_once_in_a_new_order():
    order = batches(10, 5, seed=1)
    first, second = (torch.cat([next(order), next(order)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    again = batches(10, 5, seed=1)
    assert torch.equal(first, torch.cat([next(again), next(again)]))


def test_the_tables_hold_every_arm_and_nothing_twice():
    jobs = study_jobs(["main", "quick"], None, None, ["fashion", "digits"])
    main = [job for job in jobs if job["table"] == "main"]
    assert len(main) == len(COMPARED) * 3 * 2
    assert len({json.dumps(job) for job in jobs}) == len(jobs)


def _synthetic_digits(cache):
    """A package with rows as in `digits.csv.gz`: a class is the place of its bright row or column."""
    classes = np.arange(300) % 10
    pixels = np.zeros((300, 8, 8))
    for image, kind in zip(pixels, classes, strict=True):
        (image if kind < 5 else image.T)[kind % 5] = 16
    rows = io.StringIO()
    np.savetxt(rows, np.column_stack([pixels.reshape(300, 64), classes]), fmt="%d", delimiter=",")
    (cache / "packages").mkdir(parents=True)
    with zipfile.ZipFile(cache / "packages" / "scikit_learn-1.7.2-any.whl", "w") as wheel:
        wheel.writestr("sklearn/datasets/data/digits.csv.gz", gzip.compress(rows.getvalue().encode()))


def _jobs(**changes):
    model = {**MODEL, "width": 32, "heads": 2, "experts": 4, "expert_width": 16, "patch": 2}
    shape = {"table": "main", "data": "digits", "model": model, "steps": 60, "batch": 32, "seed": 3, **changes}
    arms = [(name, ARMS[name]) for name in ("carried", "topk_gate", "carried")]
    return [
        {**shape, "arm": name, "ssr": arm.block_for(shape["steps"]), "auxiliary_loss": arm.auxiliary_loss}
        for name, arm in arms
    ]


def _work_on(cache):
    os.environ["XDG_CACHE_HOME"] = cache
    return [work(job) for job in _jobs()]


def test_runs_after_each_other_learn_repeat_and_report_every_figure(tmp_path):
    _synthetic_digits(tmp_path / "ssr_deepspeed" / "study")
    ((ssr, topk, again),) = run_ranks(1, _work_on, str(tmp_path), folder=tmp_path)
    for result in (ssr, topk):
        assert result["accuracy"] > 0.8
        assert all(len(result[name]) == 2 for name in ("max_vio_batch", "max_vio_global", "dead_experts"))
        assert all(0 <= bits <= math.log2(4) for bits in result["mutual_information"])
        assert {kind: len(levels) for kind, levels in result["corrupted"].items()} == dict.fromkeys(CORRUPTIONS, 3)
        assert result["drop_rate"]["1.0"] >= result["drop_rate"]["1.25"] == pytest.approx(result["trained_drop_rate"])
        assert 0 < result["gate_time_share"] < 1
        steps, seconds, accuracies = zip(*result["curve"], strict=True)
        assert steps == (10, 20, 30, 40, 50, 60)
        assert list(seconds) == sorted(seconds)
        assert accuracies[-1] == result["accuracy"]
    timings = ("seconds", "tokens_per_second", "gate_time_share", "curve")
    assert {k: v for k, v in ssr.items() if k not in timings} == {k: v for k, v in again.items() if k not in timings}
    lines = tmp_path / "results.jsonl"
    pairs = zip(_jobs()[:2], (ssr, topk), strict=True)
    lines.write_text("".join(json.dumps({"job": job, "result": result}) + "\n" for job, result in pairs))
    head, *rows = summary(lines, _jobs())
    assert len(rows) == 2
    assert "corrupted" in head


def test_an_unknown_arm_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="arm 'best' is unknown: choose one of topk_gate"):
        work({**_jobs()[0], "arm": "best"})
