"""Norms of long parameters, and of a part of one: what a float64 sum over all elements gives."""

import numpy as np
import oracle
import pytest
import torch
from cells import CELLS, Training

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


def thinned_ratios(name):
    """Update-to-weight ratios by role, weights around the update, elements kept and owned."""
    usual, norms_module.LARGE = norms_module.LARGE, 200
    try:
        training = Training(CELLS[name], {"preset": "observe", "monitor": {"interval": 2}})
    finally:
        norms_module.LARGE = usual
    before = training.snapshot()
    training.step(0)
    after = training.snapshot()
    kept = sum(weight.numel() for weight in training.plugin.monitor._weights)
    owned = sum(fragment.length for fragment in training.plugin.engine.fragments)
    training.step(1)
    metrics = training.plugin.metrics()
    training.close()
    return metrics, before, after, kept, owned


@pytest.mark.parametrize(("name", "world_size"), [("plain", 1), ("zero1", 3), ("fsdp2", 2)])
def test_of_large_parameters_a_part_tells_how_far_they_moved(ranks, name, world_size):
    results = ranks(world_size).run(thinned_ratios, name)
    assert sum(kept for *_, kept, _ in results) < 0.2 * sum(owned for *_, owned in results)
    for metrics, before, after, _, _ in results:
        moved = {n: (after[n] - w).ravel() for n, w in before.items() if (after[n] != w).any()}
        squares = {}
        for parameter, update in moved.items():
            taken = update[::17] if update.size > 200 else update
            role = oracle.role_and_block(parameter)[0]
            sums = np.array([np.sum(taken**2.0) / len(taken), np.mean(before[parameter] ** 2.0)])
            squares[role] = squares.get(role, 0) + update.size * sums
        assert len(squares) > 10
        for role, (update, weight) in squares.items():
            got = metrics[f"update_to_weight_by_role/{role}"]
            assert got == pytest.approx(np.sqrt(update / weight), rel=1e-3)


def test_a_part_tells_nearly_what_all_would():
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(600, 500, generator=generator)
    moved[:, :100] *= 10  # columns that are unlike others
    parts = [Fragment("w", start, length) for start, length in ((5, 123_456), (123_461, 176_539))]
    alone = Communicator.alone(torch.device("cpu"))
    held = ParameterNorms({"w": (600, 500)}, [Fragment("w", 0, 5), *parts], alone)
    flat = moved.reshape(-1)
    thinned = held.thinned([flat[:5], *(flat[p.start : p.end] for p in parts)])
    torch.testing.assert_close(torch.cat(thinned), flat[::17])
    [square] = held.squares_of_thinned(thinned)
    assert np.sqrt(square) == pytest.approx(float(moved.norm()), rel=0.02)


def test_a_ratio_is_unknown_only_where_what_it_is_over_is():
    squares, over = np.array([4.0, 4.0, 0.0, 9.0]), np.array([np.nan, 0.0, 0.0, 1.0])
    np.testing.assert_array_equal(norms_module._ratio(squares, over), [np.nan, 0, 0, 3])
