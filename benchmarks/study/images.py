"""Images of the study: Fashion-MNIST and scikit-learn's digits, and their corruptions.

Pixels are fp32 in [0, 1]. The data come from packages, see `benchmarks/study/fetch.py`.

Shapes: N images, H rows, W columns.
"""

from __future__ import annotations

import functools
import gzip
import math
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.fetch import PIP, Package, cache_folder, fetch

NAMES = ("fashion", "digits")
CLASSES = 10
DIGITS_TEST_SHARE = 0.2
_FASHION_MEMBER = "usr/share/datasets/fashion-mnist"
_DIGITS_MEMBER = "sklearn/datasets/data/digits.csv.gz"
_FASHION = Package(("apt-get", "download", "dataset-fashion-mnist"), "dataset-fashion-mnist_*.deb")
_DIGITS = Package((*PIP, "scikit-learn==1.7.2"), "scikit_learn-1.7.2-*.whl")


@dataclass(frozen=True)
class Images:
    """A data set, split."""

    train_NHW: Tensor
    train_N: Tensor
    """int64 classes."""
    test_NHW: Tensor
    test_N: Tensor


@functools.cache
def load_images(name: str) -> Images:
    """A data set, fetched if need be.

    Fashion-MNIST has a test set of its own (60,000 and 10,000 images of 28 x 28); of the 1,797 digits
    (8 x 8) a fixed random fifth is the test set.

    Raises:
        ValueError: no such data set, or it could not be fetched.

    Source: Xiao et al., arXiv 1708.07747; UCI, Optical Recognition of Handwritten Digits.
    """
    if name == "fashion":
        folder = _fashion_folder()
        parts = [read_idx(folder / f"{part}-ubyte.gz") for part in _FASHION_FILES]
        train_NHW, train_N, test_NHW, test_N = parts
        return Images(train_NHW.float() / 255, train_N.long(), test_NHW.float() / 255, test_N.long())
    if name == "digits":
        table = torch.from_numpy(_digits())
        table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
        pixels_NHW, classes_N = table[:, :-1].view(-1, 8, 8) / 16, table[:, -1].long()
        held = round(DIGITS_TEST_SHARE * len(table))
        return Images(pixels_NHW[held:], classes_N[held:], pixels_NHW[:held], classes_N[:held])
    raise ValueError(f"data {name!r} is unknown: choose one of {', '.join(NAMES)}")


_FASHION_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def read_idx(path: Path) -> Tensor:
    """A gzipped idx file of unsigned bytes, with the shape that it states.

    Raises:
        ValueError: the file is of another kind or cut short.
    """
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, 4 + 4 * data[3], 4)]
    begin = 4 + 4 * len(shape)
    if data[:3] != b"\0\0\x08" or len(data) != begin + math.prod(shape):
        raise ValueError(f"{path} is not a whole idx file of unsigned bytes: remove its folder and start again")
    return torch.frombuffer(bytearray(data[begin:]), dtype=torch.uint8).reshape(shape)


def _fashion_folder() -> Path:
    target = cache_folder() / "fashion-mnist"
    if target.exists():
        return target
    package = fetch(_FASHION, cache_folder())
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        unpack = ["dpkg-deb", "-x", str(package), folder]
        try:
            subprocess.run(unpack, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"`{' '.join(unpack)}` failed ({error}): unpack {package} by hand and move its folder "
                f"{_FASHION_MEMBER} to {target}"
            ) from None
        try:
            (Path(folder) / _FASHION_MEMBER).rename(target)
        except OSError:
            if not target.exists():  # else another process was here first
                raise
    return target


def _digits() -> np.ndarray:
    with zipfile.ZipFile(fetch(_DIGITS, cache_folder())) as wheel:
        return np.loadtxt(gzip.open(wheel.open(_DIGITS_MEMBER), "rt"), delimiter=",", dtype=np.float32)


NOISE = (0.1, 0.3, 0.5)
"""Standard deviations, of the pixel range."""
BLUR = {28: (3, 5, 7), 8: (2, 3, 4)}
"""Sides of the box in pixels, by the images' side: 7 of 8 pixels would leave nothing to see."""
CONTRAST = (0.5, 0.25, 0.1)
OCCLUSION = (1 / 16, 1 / 8, 1 / 4)
"""Covered share of the area."""
CORRUPTIONS = ("noise", "blur", "contrast", "occlusion")
LEVELS = (1, 2, 3)


def corrupt(images_NHW: Tensor, kind: str, level: int) -> Tensor:
    """Corrupted copies, the same at every call.

    Args:
        images_NHW: pixels in [0, 1].
        kind: one of `CORRUPTIONS`.
        level: 1 (mild) to 3.

    Raises:
        ValueError: another kind, level or size of images.
    """
    if kind not in CORRUPTIONS or level not in LEVELS:
        raise ValueError(f"corruption {kind!r} at level {level} is unknown: {', '.join(CORRUPTIONS)}, levels 1 to 3")
    generator = torch.Generator().manual_seed(1000 * CORRUPTIONS.index(kind) + level)
    side = images_NHW.shape[-1]
    if kind == "noise":
        noise_NHW = torch.randn(images_NHW.shape, generator=generator)
        return (images_NHW + NOISE[level - 1] * noise_NHW).clamp(0, 1)
    if kind == "contrast":
        mean_N11 = images_NHW.mean((1, 2), keepdim=True)
        return mean_N11 + CONTRAST[level - 1] * (images_NHW - mean_N11)
    if kind == "occlusion":
        return occlude(images_NHW, round(side * math.sqrt(OCCLUSION[level - 1])), generator)
    if side not in BLUR:
        raise ValueError(f"blur is defined for images with {sorted(BLUR)} pixels a side, got {side}: add them to BLUR")
    return box_blur(images_NHW, BLUR[side][level - 1])


def box_blur(images_NHW: Tensor, size: int) -> Tensor:
    """Mean over a box of `size` x `size` pixels, borders reflected; an even box reaches further right and down."""
    before, after = (size - 1) // 2, size // 2
    padded_N1HW = F.pad(images_NHW.unsqueeze(1), (before, after, before, after), mode="reflect")
    return F.avg_pool2d(padded_N1HW, size, stride=1).squeeze(1)


def occlude(images_NHW: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cover a random square of `size` x `size` pixels of each image with grey (0.5)."""
    count, side = images_NHW.shape[0], images_NHW.shape[-1]
    corner_N2 = torch.randint(side - size + 1, (count, 2), generator=generator)
    from_corner_N2S = torch.arange(side) - corner_N2.unsqueeze(-1)
    inside_N2S = (from_corner_N2S >= 0) & (from_corner_N2S < size)
    return images_NHW.masked_fill(inside_N2S[:, 0, :, None] & inside_N2S[:, 1, None, :], 0.5)
