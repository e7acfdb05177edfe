import json

import pytest
import torch
from scipy.spatial.distance import cdist

from benchmarks.published import BACKGROUND, image_pair, main, read_images


def test_the_quick_run_reaches_the_error_and_counts_fewer_newton_iterations(tmp_path, capsys):
    file = tmp_path / "lines.json"
    main(["--quick", "--seeds", "1", "--tolerance", "1e-9", "--json", str(file)])
    newton, _, sinkhorn = (json.loads(line) for line in file.read_text().splitlines())
    for record in (newton, sinkhorn):
        (run,) = record["runs"]
        assert run["converged"]
        assert run["error"] <= 1.1e-9
    assert newton["runs"][0]["iterations"] * 5 < sinkhorn["runs"][0]["iterations"]
    assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.parametrize(("power", "metric"), [(1, "cityblock"), (2, "sqeuclidean")])
def test_images_become_marginals_and_pixel_distances_the_cost(power, metric):
    images = torch.randint(0, 256, (6, 4, 5), dtype=torch.uint8)
    cost, row, column = image_pair(images, power, BACKGROUND, seed=1)
    places = [[i, j] for i in range(4) for j in range(5)]
    expected = torch.from_numpy(cdist(places, places, metric))
    torch.testing.assert_close(cost, expected / expected.max())
    for mass in (row, column):
        assert float(mass.sum()) == pytest.approx(1)
        assert float(mass.min()) >= 0.01 / 8 / 20 * (1 - 1e-12)


def test_pixels_without_mass_are_left_out():
    images = torch.zeros(2, 3, 3, dtype=torch.uint8)
    images[:, 0, 0], images[:, 1, 2] = 1, 3
    cost, row, column = image_pair(images, 1, 0.0, seed=0)
    torch.testing.assert_close(cost, torch.tensor([[0, 0.75], [0.75, 0]], dtype=torch.float64))
    assert row.tolist() == column.tolist() == [0.25, 0.75]


def test_an_idx_file_is_read_and_another_is_refused(tmp_path):
    images = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    header = b"".join(number.to_bytes(4, "big") for number in (0x803, 3, 4, 5))
    (tmp_path / "images").write_bytes(header + images.numpy().tobytes())
    assert torch.equal(read_images(tmp_path / "images"), images)
    (tmp_path / "short").write_bytes((tmp_path / "images").read_bytes()[:-1])
    with pytest.raises(ValueError, match="short is not a whole idx file"):
        read_images(tmp_path / "short")
