"""The engine matrix: every supported cell equals the oracle and the one-process run."""

import functools

import activations
import numpy as np
import pytest
from cells import CELLS, Cell, one_step, weights_after
from expected import METHODS, expected_update, relative_error
from ranks import most_ranks

SECTION = {**METHODS["depth-and-similarity-polynomial"], "monitor": {"enabled": False}}
# Acts on updates, on rows that shard boundaries cut; 24 inputs are known exactly, 37 by a sketch.
# Steps of the regularizer that would overshoot if they were not stable.
ACTIVATIONS = activations.section_of(
    {"rank": 8}, regularizer={"strength": 0.1, "ridge": 0.3, "coupling": "decoupled"}
)
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
# Options of DeepSpeed that change tensors, memory or order.
OPTIONS = {
    "round-robin": {"round_robin_gradients": True},
    "overlapping-small-buckets": {
        "overlap_comm": True,
        "reduce_bucket_size": 700,
        "allgather_bucket_size": 500,
    },
    "not-contiguous-no-reduce-scatter": {"contiguous_gradients": False, "reduce_scatter": False},
}
ALL_CELLS = {
    **CELLS,
    **{
        f"zero{stage}-{option}": Cell("deepspeed", stage, zero=zero)
        for stage in (1, 2)
        for option, zero in OPTIONS.items()
    },
}
# FSDP2 cuts between rows; DDP, ZeRO-0 and one process hold all.
CUTS_ROWS = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-small-sub-groups")
STEPS = 5


def ranks_of(cell, wanted):
    """How many ranks a cell is tried on: as many as are wanted, if it can have them here."""
    possible = [size for size in cell.world_sizes if size <= most_ranks()] or cell.world_sizes
    return wanted if wanted in possible else max(possible)


@pytest.fixture(scope="module")
def unclipped(ranks):
    """The same step without the plugin: by one process where the cell is as precise as that."""
    return functools.cache(lambda size, name: step_of(ranks, size, name, [None])[0])


def step_of(ranks, world_size, name, sections, *arguments):
    """The facts of a step of a cell, by rank and section."""
    arguments = arguments or (1, 0.0)
    model = activations.CalledByIds
    return ranks(world_size).run(one_step, ALL_CELLS[name], sections, *arguments, model)


@functools.cache
def one_process_operators(ranks):
    """The graphs that one process makes."""
    return step_of(ranks, 1, "plain", [ACTIVATIONS])[0][0]["operators"]


def norm_of(gradients):
    return np.sqrt(sum((g**2).sum() for g in gradients.values()))


@pytest.mark.parametrize("name", ALL_CELLS)
def test_a_step_of_every_cell_equals_the_oracle_clipped_by_the_norm_of_the_filtered_gradient(
    ranks, unclipped, name
):
    cell = ALL_CELLS[name]
    is_alike = cell.precision == "fp32" and not cell.zero_init
    both = [SECTION, ACTIVATIONS] if name in CELLS else [SECTION]
    if is_alike:
        world_size, (plain,) = ranks_of(cell, 3), unclipped(1, "plain")
        sections, limit = both, 0.01
    else:  # ranks round otherwise than one; not clipped
        world_size, sections, limit = ranks_of(cell, 2), [None, *both], 0.0
    results = step_of(ranks, world_size, name, sections, 2, limit)
    if not is_alike:
        plain = results[0][0]
    expected = expected_of(both, plain, limit)
    for result in results:
        for found, wanted in zip(result[-len(both) :], expected, strict=True):
            assert relative_error(found["gradients"], wanted, 1) <= TOLERANCE[cell.precision]
    if is_alike:  # so are the graphs, and the same to the bit on all ranks
        for result in results if name in CELLS else ():
            for key, operator in one_process_operators(ranks).items():
                np.testing.assert_allclose(
                    result[-1]["operators"][key], operator, atol=1e-6 * operator.max()
                )
                np.testing.assert_array_equal(
                    result[-1]["operators"][key], results[0][-1]["operators"][key]
                )
    if name in CUTS_ROWS and world_size > 1:
        assert activations.cut_rows([result[-1] for result in results]) > 0
    results = [found[-1] for found in results]
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
    # Replicas stay the same to the bit, and so does what is gathered from shards.
    for result in results[1:]:
        for parameter, value in results[0]["after"].items():
            np.testing.assert_array_equal(result["after"][parameter], value)


def expected_of(sections, plain, limit):
    """The updates by the oracle, whose gradients are clipped before they are applied."""
    found = []
    for section in sections:
        if section is SECTION:
            _, _, expected = expected_update(section, plain)
            norm = norm_of(expected)
        else:
            expected = activations.expected_update(section, plain)
            norm = norm_of(plain["gradients"])
        if limit:
            assert norm > 2 * limit
            factor = limit / (norm + 1e-6)  # as engines do
            expected = {parameter: factor * g for parameter, g in expected.items()}
        found.append(expected)
    return found


@pytest.fixture(scope="module")
def one_process(ranks):
    """Weights after some steps on one rank, by the cell that makes the same initial weights."""
    return functools.cache(lambda name: ranks(1).run(weights_after, STEPS, name, SECTION)[0])


@pytest.mark.parametrize(
    "name",
    [n for n, cell in CELLS.items() if cell.precision == "fp32" and max(cell.world_sizes) > 1],
)
def test_steps_of_adamw_equal_the_one_process_run(ranks, one_process, name):
    cell = CELLS[name]
    for weights in ranks(ranks_of(cell, 4 if name == "hsdp" else 2)).run(
        weights_after, STEPS, name, SECTION
    ):
        # zero.Init draws other initial weights.
        reference = one_process(name if cell.zero_init else "plain")
        for parameter, value in reference.items():
            np.testing.assert_allclose(weights[parameter], value, atol=1e-4)


def test_the_norm_of_the_replicated_bf16_optimizer_is_that_of_the_filtered_gradient(ranks):
    name = "zero1-bf16-fp32-accumulation"
    [plain] = ranks(2).run(one_step, name, [None])[0]
    _, _, expected = expected_update(SECTION, plain)
    norm = norm_of(expected)
    assert norm_of(plain["gradients"]) > 1.05 * norm
    expected = {n: g / 3 for n, g in expected.items()}
    [result] = ranks(2).run(one_step, name, [SECTION], 1, float(norm) / 3)[0]
    assert relative_error(result["gradients"], expected, 1) <= 2e-2
