"""What a step leaves out has no gradient: nothing of it is filtered, penalized or spread.

A whole step, then a step without the last block, on every kind of engine; and what of it is used
equals the oracle, as gradient, as update and with the joint regularizer.
"""

import functools

import numpy as np
import oracle
import pytest
import tiny
from cells import CELLS, ThereAndBack, Training, steps_from_here
from expected import METHODS, expected_update, relative_error

QUIET = {"monitor": {"enabled": False}}
METHOD = {**METHODS["depth-and-similarity-polynomial"], **QUIET}
STRENGTH, RIDGE = 1e-3, 0.7
SECTIONS = {
    "plain": None,
    "gradient": METHOD,
    "update": {**METHOD, "filter": {**METHOD["filter"], "apply_to": "update"}},
    "joint": {
        **QUIET,
        "graph": METHOD["graph"],
        "filter": {"response": "identity"},
        "regularizer": {"strength": STRENGTH, "ridge": RIDGE, "reference": "zero"},
    },
}
CASES = [
    ("plain", 1),
    ("zero0", 2),
    ("zero1", 3),
    ("zero1-bf16-fp32-accumulation", 2),
    ("zero2", 2),
    ("zero2-offload", 3),
    ("zero2-fp16", 2),
    ("zero3", 3),
    ("zero3-offload", 2),
    ("zero3-small-sub-groups", 2),
    ("fsdp2", 3),
    ("ddp", 2),
]


def steps_that_leave_out_a_block(name):
    """By each section, the facts of a step without the last block, after a whole one."""
    training = Training(name, None, ThereAndBack, model=tiny.Shortened)
    found = {}
    for label, section in SECTIONS.items():
        training.step(0)  # by which gradients that an engine keeps are the same for each
        training.back()
        [found[label]] = steps_from_here(training, [section], 1, blocks=2)
    training.close()
    return found


@pytest.fixture(scope="module")
def steps(ranks):
    return functools.cache(lambda name, size: ranks(size).run(steps_that_leave_out_a_block, name))


def is_unused(name):
    return ".layers.2." in name or name.startswith("spare")


def tolerance(name):
    return 1e-5 if CELLS[name].precision == "fp32" else 1e-2


def check_filtered(steps, name, world_size, what, factors):
    """The filtered step is the oracle's of what is used, each parameter's times its factor.

    ZeRO-0 gives an unused parameter zeros, filtered like any other; elsewhere it has none, and what
    the engine does with it (ZeRO-3 and offload step it again) stays as it is.
    """
    results = steps(name, world_size)
    plain = results[0]["plain"]
    scaled = {n: factors[n] * g.astype(np.float64) for n, g in plain["gradients"].items()}
    current = {n: np.zeros_like(g) if is_unused(n) else g for n, g in scaled.items()}
    given = {"weights": plain["weights"], "gradients": current}
    _, _, expected = expected_update(SECTIONS[what], given)
    if CELLS[name].stage != 0:
        expected |= {n: g for n, g in scaled.items() if is_unused(n)}
    for result in results:
        got = {n: factors[n] * g for n, g in result[what]["gradients"].items()}
        is_exact = CELLS[name].precision == "fp32"
        assert relative_error(got, expected, 1e-2 if is_exact else 1) <= tolerance(name)


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_gradients_of_used_parameters_are_filtered(steps, name, world_size):
    ones = dict.fromkeys(steps(name, world_size)[0]["plain"]["rates"], 1.0)
    check_filtered(steps, name, world_size, "gradient", ones)


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_updates_of_used_parameters_are_filtered(steps, name, world_size):
    """Unlike gradients times the learning rate: neighbours differ in theirs."""
    check_filtered(steps, name, world_size, "update", steps(name, world_size)[0]["plain"]["rates"])


@pytest.mark.parametrize(
    ("name", "world_size"),
    # Zeros of ZeRO-0 count as used; low precision hides what is as small.
    [c for c in CASES if CELLS[c[0]].stage != 0 and CELLS[c[0]].precision == "fp32"],
)
def test_the_joint_gradient_of_used_parameters_is_added(steps, name, world_size):
    results = steps(name, world_size)
    plain = results[0]["plain"]
    gradients = {n: g for n, g in plain["gradients"].items() if tiny.is_filtered(n)}
    weights = {n: plain["weights"][n] for n in gradients}
    graph = METHOD["graph"]
    laplacian = oracle.laplacian_of(oracle.adjacency_of(weights, graph["edges"]), "combinatorial")
    term = oracle.apply_function(laplacian, lambda v: v + RIDGE, weights)
    expected = {n: g + STRENGTH * term[n] for n, g in gradients.items() if not is_unused(n)}
    for result in results:
        got = result["joint"]["gradients"]
        assert relative_error(got, expected) <= 1e-5
        for parameter in filter(is_unused, gradients):
            np.testing.assert_array_equal(got[parameter], gradients[parameter])
