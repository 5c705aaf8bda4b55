"""The lowest eigenpairs: against dense spectra, ARPACK and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
from cells import Training
from synthetic import GRAPHS, Sharded, random_arrays

from spectral_ds.graph import Depth, Ring, Similarity
from spectral_ds.spectrum import (
    density_of_states,
    lowest_eigenpairs,
)
from spectral_ds.spectrum.eigenpairs import DENSE_NODES
from spectral_ds.spectrum.rings import ring_eigenpairs, ring_weight

LARGE = {
    "similarity": (
        random_arrays({"l.0.w": (660, 5), "l.1.w": (660, 5)}),
        [Similarity(6, "role")],
        "row",
        True,
    ),
    "ring": (random_arrays({"w": (200, 101)}), [Ring(0.3)], "element", False),
}


COUNT = 6


def solved(name, dense_nodes, alone=False):
    """The lowest eigenpairs as this rank has them, each with the dense L of its parameters."""
    sharded = Sharded(*GRAPHS[name], alone=alone)
    found = lowest_eigenpairs(
        sharded.graph, COUNT, sharded.communicator, seed=3, dense_nodes=dense_nodes
    )
    return [(vars(pairs), sharded.graph.laplacian(pairs.parameters).toarray()) for pairs in found]


def whole_pairs(results):
    """(eigenvalues, eigenvectors, dense L) of each group, from all ranks."""
    groups = []
    for parts in zip(*results, strict=True):
        first, laplacian = parts[0]
        for facts, same in parts:
            assert facts["parameters"] == first["parameters"]
            np.testing.assert_array_equal(facts["values"], first["values"])
            np.testing.assert_array_equal(facts["residuals"], first["residuals"])
            np.testing.assert_array_equal(same, laplacian)
        rows = np.concatenate([facts["rows"] for facts, _ in parts])
        assert sorted(rows) == list(range(len(laplacian) // first["copies"]))
        vectors = np.zeros((len(rows), len(first["values"])))
        vectors[rows] = np.concatenate([facts["vectors"] for facts, _ in parts])
        copies = np.eye(first["copies"])  # the same vector on each of the equal paths
        groups.append((first["values"], vectors, np.kron(vectors, copies), laplacian))
    return groups


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_lowest_eigenpairs_are_those_of_the_dense_laplacian(ranks, name, world_size):
    alone = whole_pairs([solved(name, 0, True)])
    results = [solved(name, 0, True)] if world_size == 1 else ranks(world_size).run(solved, name, 0)
    for (values, vectors, copied, laplacian), one in zip(whole_pairs(results), alone, strict=True):
        copies = len(laplacian) // len(vectors)
        spectrum = scipy.linalg.eigh(laplacian, eigvals_only=True)
        assert len(values) == min(COUNT, len(vectors))
        np.testing.assert_allclose(
            np.repeat(values, copies), spectrum[: len(values) * copies], atol=1e-9
        )
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-9)
        residual = laplacian @ copied - copied * np.repeat(values, copies)
        assert np.linalg.norm(residual, axis=0).max() <= 1e-5
        np.testing.assert_allclose(values, one[0], atol=1e-9)
        # Vectors of equal eigenvalues may turn among themselves, also with those beyond the last.
        distinct = np.flatnonzero(np.diff(spectrum[::copies]) > 1e-3) + 1
        known = distinct[distinct <= len(values)].max(initial=0)
        known = len(values) if len(values) == len(vectors) else known
        spaces = [v[:, :known] @ v[:, :known].T for v in (vectors, one[1])]
        np.testing.assert_allclose(*spaces, atol=1e-4)


def solved_large(name):
    """The lowest eigenpairs as this rank has them, and the sparse L."""
    sharded = Sharded(*LARGE[name])
    [pairs] = lowest_eigenpairs(sharded.graph, COUNT, sharded.communicator, seed=3)
    return vars(pairs), sharded.graph.laplacian()


def whole_vectors(results):
    rows, vectors = (
        np.concatenate([facts[key] for facts, _ in results]) for key in ("rows", "vectors")
    )
    assert sorted(rows) == list(range(len(rows)))
    return vectors[np.argsort(rows)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_lowest_eigenpairs_of_a_large_graph_are_those_of_arpack(ranks, world_size):
    results = ranks(world_size).run(solved_large, "similarity")
    facts, laplacian = results[0]
    nodes = laplacian.shape[0]
    assert nodes > DENSE_NODES
    assert facts["residuals"].max() > 1e-11  # found by iteration
    # Shifted, since L is singular.
    expected = scipy.sparse.linalg.eigsh(laplacian, COUNT, sigma=-0.01, return_eigenvectors=False)
    np.testing.assert_allclose(facts["values"], np.sort(expected), atol=1e-9)
    vectors = whole_vectors(results)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(COUNT), atol=1e-9)
    residual = laplacian @ vectors - vectors * facts["values"]
    assert np.linalg.norm(residual, axis=0).max() <= 1e-5


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_ring_too_long_for_any_iteration_is_solved(ranks, world_size):
    results = ranks(world_size).run(solved_large, "ring")
    facts, laplacian = results[0]
    nodes = laplacian.shape[0]
    waves = np.array([0, 1, 1, 2, 2, 3])
    # 1 − cos to second order, as good as exact where λ is 1e-7.
    np.testing.assert_allclose(facts["values"], 0.3 * (2 * np.pi * waves / nodes) ** 2, rtol=1e-6)
    vectors = whole_vectors(results)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(COUNT), atol=1e-9)
    residual = laplacian @ vectors - vectors * facts["values"]
    assert np.linalg.norm(residual, axis=0).max() <= 1e-12
    assert facts["residuals"].max() <= 1e-12


RING_SIZES = (3, 4, 9, 10)


def rings(alone=False):
    """Eigenpairs in closed form of short rings, with the dense L; whether others are taken for one.

    Every rank gives the rows that it answers for.
    """
    found = []
    for nodes in RING_SIZES:
        for normalized in (False, True):
            arrays = random_arrays({"w": (nodes, 5)})
            sharded = Sharded(arrays, [Ring(0.4)], "row", normalized, alone)
            [group] = sharded.graph.groups
            weight = ring_weight(group, sharded.communicator)
            values, vectors, residuals = ring_eigenpairs(
                group, weight, nodes, normalized, sharded.communicator
            )
            rows = group.primary_rows(sharded.communicator.rank)
            laplacian = sharded.graph.laplacian().toarray()
            found.append((weight, values, rows, vectors, residuals, laplacian))
    others = {}
    for name, (arrays, families) in NO_RINGS.items():
        sharded = Sharded(arrays, families, alone=alone)
        weights = [ring_weight(group, sharded.communicator) for group in sharded.graph.groups]
        others[name] = weights
    return found, others


def with_zeros(nodes, zeros):
    """Rows of which the first are 0: similarity joins the last ones alone."""
    rows = np.random.default_rng(2).standard_normal((nodes, 4))
    rows[:zeros] = 0
    return {"w": rows}


NO_RINGS = {
    "a chord among the last nodes alone": (with_zeros(40, 36), [Ring(), Similarity(3)]),
    "three nodes by unequal edges": (with_zeros(3, 0), [Ring(), Similarity(2)]),
    "two rings that are joined": (
        random_arrays({"l.0.w": (5, 2), "l.1.w": (5, 2)}),
        [Ring(), Depth()],
    ),
    "four nodes around two parameters": (
        random_arrays({"l.0.w": (2, 2), "l.1.w": (2, 2)}),
        [Ring(), Depth()],
    ),
    "a triangle of parameters": (
        {f"l.{i}.b": np.eye(3)[i] for i in range(3)},
        [Similarity(2, "role")],
    ),
    "a ring in another order": (
        {"w": np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])},
        [Similarity(2)],
    ),
    "a path whose ends are inside": (  # rows 3, 0, 1, 2, each like the next
        {"w": np.array([[0.0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0]])},
        [Similarity(1)],
    ),
    "two nodes": (random_arrays({"w": (2, 30)}), [Ring()]),
    "one node": (random_arrays({"w": (30,)}), [Ring()]),
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rings_in_closed_form_are_those_of_the_dense_laplacian_and_nothing_else_is(
    ranks, world_size
):
    results = [rings(alone=True)] if world_size == 1 else ranks(world_size).run(rings)
    for parts in zip(*(found for found, _ in results), strict=True):
        weight, values, _, _, residuals, laplacian = parts[0]
        assert weight == pytest.approx(0.4)
        spectrum, basis = np.linalg.eigh(laplacian)
        np.testing.assert_allclose(values, spectrum, atol=1e-12)
        rows = np.concatenate([part[2] for part in parts])
        vectors = np.concatenate([part[3] for part in parts])[np.argsort(rows)]
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(rows)), atol=1e-12)
        assert np.abs(laplacian @ vectors - vectors * values).max() <= 1e-12
        assert residuals.max() <= 1e-12
        for last in np.flatnonzero(np.diff(spectrum) > 1e-6) + 1:  # the space up to each gap
            spaces = [each[:, :last] @ each[:, :last].T for each in (vectors, basis)]
            np.testing.assert_allclose(*spaces, atol=1e-12)
        for part in parts:
            np.testing.assert_array_equal(part[1], values)
            np.testing.assert_array_equal(part[4], residuals)
    for _, others in results:
        assert others == {name: [None] * len(weights) for name, weights in others.items()}


WEAK = {
    "similarity": (random_arrays({"w": (90, 6)}), [Similarity(5, weight=1e-4)], "row", False),
    "depth and ring": (
        random_arrays({f"l.{i}.w": (30, 5) for i in range(3)}),
        [Depth(1e-4), Ring(1e-4)],
        "row",
        False,
    ),
}


@pytest.mark.parametrize("name", WEAK)
def test_eigenvalues_of_weak_edges_are_as_exact_as_those_of_strong_ones(name):
    sharded = Sharded(*WEAK[name], alone=True)
    [pairs] = lowest_eigenpairs(sharded.graph, COUNT, sharded.communicator, seed=3, dense_nodes=0)
    laplacian = sharded.graph.laplacian().toarray()
    spectrum = np.linalg.eigvalsh(laplacian)
    np.testing.assert_allclose(pairs.values, spectrum[:COUNT], rtol=0, atol=1e-9 * spectrum[-1])


PAIRS = 3


def spectra_of_a_run(name, dense_nodes=None):
    """Eigenpairs and density by the plugin, and the dense L of every group.

    Args:
        dense_nodes: groups of more are solved without their dense L; None: as it is.
    """
    if dense_nodes is not None:
        with pytest.MonkeyPatch.context() as patch:
            for solver in (lowest_eigenpairs, density_of_states):
                assert "dense_nodes" in solver.__kwdefaults__
                patch.setitem(solver.__kwdefaults__, "dense_nodes", dense_nodes)
            return spectra_of_a_run(name)
    section = {"graph": {"include": ["*_proj.*"], "edges": [{"family": "similarity"}]}}
    training = Training(name, section)
    plugin = training.plugin
    found = [
        (vars(pairs), plugin.graph.laplacian(pairs.parameters).toarray())
        for pairs in plugin.eigenpairs(PAIRS)
    ]
    density = plugin.density(5)
    training.close()
    return found, density, plugin.graph.laplacian().toarray()


@pytest.fixture(scope="module")
def spectra_of_large_groups(ranks):
    """As one process solves them without their dense L."""
    return ranks(1).run(spectra_of_a_run, "plain", 4)[0]


@pytest.mark.parametrize("name", ["zero2", "fsdp2"])
def test_the_plugin_solves_groups_too_large_for_a_dense_laplacian(
    ranks, spectra_of_large_groups, name
):
    pairs, alone, _ = spectra_of_large_groups
    results = ranks(3).run(spectra_of_a_run, name, 4)
    for found in (pairs, results[0][0]):
        assert max(facts["residuals"].max() for facts, _ in found) > 1e-11  # by iteration
    both = zip(whole_pairs([found for found, *_ in results]), whole_pairs([pairs]), strict=True)
    for (values, vectors, _, laplacian), (same, *_) in both:
        assert len(laplacian) > 4
        np.testing.assert_allclose(values, np.linalg.eigvalsh(laplacian)[:PAIRS], atol=1e-9)
        np.testing.assert_allclose(values, same, atol=1e-9)
        assert np.linalg.norm(laplacian @ vectors - vectors * values, axis=0).max() <= 1e-5
    for _, density, laplacian in results:
        np.testing.assert_allclose(density.share, alone.share, atol=1e-6)
        counts = np.histogram(np.linalg.eigvalsh(laplacian).clip(0), np.linspace(0, 2, 6))[0]
        exact = counts / len(laplacian)
        assert 0 < np.abs(density.share - exact).max() <= 0.1  # an estimate


def test_the_plugin_gives_eigenpairs_and_density(ranks):
    results = ranks(2).run(spectra_of_a_run, "zero3")
    for values, vectors, _, laplacian in whole_pairs([found for found, *_ in results]):
        assert len(values) == PAIRS
        np.testing.assert_allclose(values, np.linalg.eigvalsh(laplacian)[:PAIRS], atol=1e-9)
        assert np.abs(laplacian @ vectors - vectors * values).max() <= 1e-9
    for _, density, laplacian in results:
        values = np.linalg.eigvalsh(laplacian).clip(0)
        counts = np.histogram(values, np.linspace(0, 2, 6))[0]
        np.testing.assert_allclose(density.share, counts / len(laplacian), atol=1e-12)
