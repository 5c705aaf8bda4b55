"""Norms of long parameters, and of a part of one: what a float64 sum over all elements gives."""

import numpy as np
import pytest
import torch

from spectral_ds.filters import NormKeeper
from spectral_ds.graph import ParameterNodes
from spectral_ds.monitor import ParameterNorms
from spectral_ds.monitor import norms as norms_module
from spectral_ds.sharding import Communicator, Fragment
from spectral_ds.spectrum import squared_norm

ALONE = Communicator.alone(torch.device("cpu"))
ROWS, WIDTH = 2**14, 2**10 + 8  # more elements than float32 adds up one by one


@pytest.fixture(scope="module")
def long():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS * WIDTH, generator=generator).mul_(1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-5)])
def test_norms_of_a_long_parameter_do_not_depend_on_how_it_is_cut(long, dtype, tolerance):
    values = long.to(dtype)
    expected = sum(float(part.double().square().sum()) for part in values.split(2**22)) ** 0.5
    for count in (1, 8):
        parts = list(values.chunk(count))
        starts = np.cumsum([0, *(len(part) for part in parts)])
        fragments = [Fragment("w", int(s), len(p)) for s, p in zip(starts, parts, strict=False)]
        norms = ParameterNorms({"w": (ROWS, WIDTH)}, fragments, ALONE)
        found = [
            norms.squares(parts)[0, 0] ** 0.5,
            float(squared_norm(parts, ALONE)) ** 0.5,
            float(NormKeeper([0] * count, 1, ALONE).norms(parts)[0]),
        ]
        np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("columns", ["first", "seventeenth", "last"])
def test_a_part_of_a_wide_parameter_sees_all_its_columns(monkeypatch, columns):
    rows, width = 4000, 17 * 16
    monkeypatch.setattr(norms_module, "LARGE", 1000)
    norms = ParameterNorms({"w": (rows, width)}, [Fragment("w", 0, rows * width)], ALONE)
    # Only these columns move: every 17th element would be of the same few, row after row.
    moving = {"first": slice(0, None, 17), "seventeenth": slice(16, None, 17), "last": slice(200)}
    update = torch.zeros(rows, width)
    generator = torch.Generator().manual_seed(0)
    some = update[:, moving[columns]]
    some.copy_(torch.randn(some.shape, generator=generator))
    thinned = norms.thinned([update.reshape(-1)])
    assert len(thinned[0]) < rows * width / 15
    [square] = norms.squares_of_thinned(thinned)
    assert square**0.5 == pytest.approx(float(update.norm()), rel=0.05)


def test_no_stride_has_a_divisor_in_common_with_the_width(monkeypatch):
    monkeypatch.setattr(norms_module, "LARGE", 0)
    widths = [*range(1, 2000), 17 * 1024, 17 * 19 * 23, 17 * 19 * 23 * 29 * 31]
    strides = [norms_module._stride(ParameterNodes("w", (3, width))) for width in widths]
    assert (np.gcd(widths, strides) == 1).all()
    assert min(strides) == strides[0] == 17  # where nothing speaks against it


def test_only_large_parameters_are_thinned(monkeypatch):
    monkeypatch.setattr(norms_module, "LARGE", 60)
    shapes = {"small": (6, 10), "large": (61,)}
    norms = ParameterNorms(shapes, [Fragment("small", 0, 60), Fragment("large", 0, 61)], ALONE)
    small, large = norms.thinned([torch.arange(60.0), torch.arange(61.0)])
    assert small.tolist() == list(range(60))
    assert large.tolist() == [0, 17, 34, 51]
