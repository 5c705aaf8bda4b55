"""The engine matrix: every supported cell equals the oracle and the one-process run."""

import functools

import numpy as np
import pytest
from cells import CELLS, one_step, ten_steps
from test_oracle import METHODS, expected_update, relative_error

SECTION = METHODS["depth-and-similarity-polynomial"]
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


@pytest.fixture(scope="module")
def unfiltered(ranks):
    """The same step without the plugin: by one process where the cell is as precise as that."""
    run = functools.cache(
        lambda size, *cell: ranks(size).run(one_step, cell[0], None, *cell[1:])[0]
    )

    def step(name, world_size, accumulation):
        is_alike = CELLS[name].precision == "fp32" and not CELLS[name].zero_init
        return run(1, "plain", 1) if is_alike else run(world_size, name, accumulation)

    return step


def world_sizes(name):
    """Where a cell is tried. Options change tensors, memory or order, not who owns what."""
    return (3,) if "-" in name else CELLS[name].world_sizes


@pytest.mark.parametrize(
    ("name", "world_size", "accumulation"),
    [
        (name, size, accumulation)
        for name, cell in CELLS.items()
        for size in world_sizes(name)
        for accumulation in ((1, 2) if cell.precision == "fp32" else (2,))
        if accumulation == 1 or size == 3
    ],
)
def test_a_step_of_every_cell_equals_the_oracle(ranks, unfiltered, name, world_size, accumulation):
    plain = unfiltered(name, world_size, accumulation)
    _, _, expected = expected_update(SECTION, plain)
    results = ranks(world_size).run(one_step, name, SECTION, accumulation)
    for result in results:
        assert relative_error(result["gradients"], expected) <= TOLERANCE[CELLS[name].precision]
        assert result["metrics"]["edges"] > 0
    # Each element of each trainable parameter has exactly one owner in each group of shards.
    group = results[0]["shard_ranks"]
    for first in range(0, world_size if group > 1 else 1, group):
        members = results[first : first + group]
        for parameter, size in results[0]["sizes"].items():
            count = np.zeros(size, int)
            for result in members:
                for owned, start, length in result["owned"]:
                    if owned == parameter:
                        count[start : start + length] += 1
            assert (count == 1).all()


@pytest.fixture(scope="module")
def one_process(ranks):
    """Weights after ten steps on one rank, by the cell that makes the same initial weights."""
    return functools.cache(lambda name: ranks(1).run(ten_steps, name, SECTION)[0])


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        (name, size)
        for name, cell in CELLS.items()
        for size in world_sizes(name)
        if cell.precision == "fp32" and (size in (2, 3) or cell.engine == "hsdp")
    ],
)
def test_ten_adamw_steps_equal_the_one_process_run(ranks, one_process, name, world_size):
    for weights in ranks(world_size).run(ten_steps, name, SECTION):
        # zero.Init draws other initial weights.
        reference = one_process(name if CELLS[name].zero_init else "plain")
        for parameter, value in reference.items():
            np.testing.assert_allclose(weights[parameter], value, atol=1e-4)


@pytest.mark.parametrize(
    "name", [n for n, c in CELLS.items() if c.precision == "fp32" and 2 in c.world_sizes]
)
def test_clipping_uses_the_norm_of_the_filtered_gradient(ranks, unfiltered, name):
    limit = 0.01
    _, _, expected = expected_update(SECTION, unfiltered(name, 2, 1))
    norm = np.sqrt(sum((g**2).sum() for g in expected.values()))
    assert norm > 2 * limit
    expected = {parameter: g * limit / norm for parameter, g in expected.items()}
    result = ranks(2).run(one_step, name, SECTION, 1, limit)[0]
    assert relative_error(result["gradients"], expected) <= 1e-4  # engines add 1e-6 to norms


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_depth_edges_between_parameters_cut_alike_send_nothing(ranks, name, world_size):
    section = METHODS["depth-window"]
    for result in ranks(world_size).run(one_step, name, section):
        assert result["bytes_sent"] == 0
        assert result["metrics"]["boundary_bytes"] == 0
