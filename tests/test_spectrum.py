"""Eigenpairs, density of states, sketches, signal and noise, the verdict: against dense spectra.

Graphs are synthetic: parameters one after another, cut at awkward places; some ranks own nothing.
"""

import logging
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
import torch.distributed as dist
from cells import CELLS, Training

import spectral_ds
from spectral_ds.checkpoint import SavedState
from spectral_ds.filters import whiten_gains, wiener_gains
from spectral_ds.graph import Depth, ParameterNodes, Ring, Similarity
from spectral_ds.laplacian import ParameterGraph, WeightFeatures, Work, plan_operators
from spectral_ds.monitor.verdict import ENOUGH_SAMPLES, verdict
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches.node_sketches import Sketches
from spectral_ds.spectrum import (
    GradientStatistics,
    SignalAndNoise,
    Spectrometer,
    density_of_states,
    kept_over_total,
    lowest_eigenpairs,
)
from spectral_ds.spectrum.eigenpairs import DENSE_NODES
from spectral_ds.spectrum.rings import ring_eigenpairs, ring_weight

CPU = torch.device("cpu")
CUTS = {1: (), 2: (0.37,), 3: (0.0, 0.715), 4: (0.23, 0.23, 0.62)}


def shards(arrays, world_size):
    """The fragments of every rank, in reverse; long ones in two, as in small sub-groups."""
    total = sum(array.size for array in arrays.values())
    edges = [0, *(int(share * total) for share in CUTS[world_size]), total]
    found = [[] for _ in range(world_size)]
    first = 0
    for name, array in arrays.items():
        for rank, (low, high) in enumerate(pairwise(edges)):
            start, end = max(low - first, 0), min(high - first, array.size)
            middle = start + 31 if end - start > 100 else end
            for run in ((middle, end), (start, middle)):
                if run[0] < run[1]:
                    found[rank].append(Fragment(name, run[0], run[1] - run[0]))
        first += array.size
    return tuple(tuple(reversed(own)) for own in found)


class Sharded:
    """A graph and signals on the ranks of a pool, or in this process alone."""

    def __init__(self, arrays, families, kind="row", normalized=True, alone=False):
        self.communicator = Communicator.alone(CPU) if alone else Communicator(None, CPU)
        rank, world_size = self.communicator.rank, self.communicator.world_size
        self.layout = ShardLayout(shards(arrays, world_size), rank)
        self.parameters = [ParameterNodes(n, array.shape, kind) for n, array in arrays.items()]
        weights = WeightFeatures(self.layout.own, self.local(arrays), 0, self.communicator)
        self.graph = ParameterGraph.build(
            self.parameters,
            families,
            self.layout,
            {"weights": weights},
            self.communicator,
            normalized=normalized,
            progress=lambda done: None,
        )

    def local(self, arrays):
        """This rank's fragments of a signal."""
        flat = {name: torch.from_numpy(array).reshape(-1) for name, array in arrays.items()}
        return [flat[f.parameter][f.start : f.end].float().clone() for f in self.layout.own]

    def whole(self, fragments):
        """The signal of these fragments, by parameter, on every rank."""
        own = [(f, v.numpy().copy()) for f, v in zip(self.layout.own, fragments, strict=True)]
        found = {p.name: np.full(p.numel, np.nan) for p in self.parameters}
        for part in self.communicator.gather_objects(own):
            for fragment, values in part:
                found[fragment.parameter][fragment.start : fragment.end] = values
        return {p.name: found[p.name].reshape(p.shape) for p in self.parameters}

    def plan(self, graph, layout, **changes):
        usual = {
            "work": Work(hops=1, moves=2),
            "exchange": "boundary",
            "kernel": "torch_csr",
            "bucket_elements": 2**20,
        }
        communicator = self.communicator
        return plan_operators(graph, layout, communicator, communicator, **{**usual, **changes})

    def statistics(self, sketch_width=0, bands=4, decay=0.9, keeps_mean=True):
        sketches = Sketches(self.parameters, self.layout, sketch_width, 0, self.communicator)
        signals = self.graph.of_node_signals(sketches.columns, sketches.layout)
        plan = self.plan(signals, sketches.layout)
        spectrometer = Spectrometer(sketches, plan, self.communicator)
        return GradientStatistics(
            sketches, spectrometer, bands=bands, decay=decay, keeps_mean=keeps_mean
        )


def random_arrays(shapes, seed=0):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name, shape in shapes.items()}


def clusters():
    """Rows of three kinds that have nothing in common, so that no edges join them."""
    rows = np.abs(np.random.default_rng(1).standard_normal((150, 9)))
    return {"w": rows * np.kron(np.eye(3), np.ones((50, 3)))}


PATHS = random_arrays(
    {f"l.{i}.w": (9, 5) for i in range(7)} | {f"l.{i}.b": (4,) for i in (0, 2, 3)}
)
GRAPHS = {
    "similarity": (
        random_arrays({"l.0.w": (90, 6), "l.1.w": (90, 6), "head": (53, 4), "bias": (7,)}),
        [Similarity(5, "role")],
        "row",
        True,
    ),
    "columns": (random_arrays({"w": (6, 101), "v": (4, 47)}), [Similarity(4)], "column", False),
    "components": (clusters(), [Similarity(5)], "row", False),
    "pairs-only": ({"w": np.kron(np.eye(50), [[1.0], [1.0]])}, [Similarity(1)], "row", True),
    "ring": (random_arrays({"w": (110, 3)}), [Ring(0.5)], "row", False),
    "ring-of-elements": (random_arrays({"w": (11, 10)}), [Ring()], "element", True),
    "depth": (PATHS, [Depth()], "row", False),
}
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


PROBES = 64


def densities(name, alone=False):
    """Of all eigenvalues, exactly and estimated."""
    sharded = Sharded(*GRAPHS[name], alone=alone)
    return [
        density_of_states(
            sharded.graph, 8, sharded.communicator, seed=5, probes=PROBES, dense_nodes=dense_nodes
        )
        for dense_nodes in (1024, 0)
    ]


@pytest.mark.parametrize("name", ["similarity", "columns", "components", "ring", "depth"])
def test_density_is_that_of_the_dense_eigenvalues(ranks, name):
    graph = Sharded(*GRAPHS[name], alone=True).graph
    values, vectors = np.linalg.eigh(graph.laplacian().toarray())
    exact, estimated = densities(name, alone=True)
    edges = np.linspace(0, graph.lambda_max, 9)
    for density in (exact, estimated):
        np.testing.assert_allclose(density.edges, edges, rtol=1e-12)
        assert density.share.sum() == pytest.approx(1)
    # An eigenvalue at an edge, as many are of rings and paths, may count to either side.
    counted = np.cumsum(exact.share) * len(values)
    assert (
        counted >= [(values < edge - 1e-9).sum() for edge in edges[1:]] - np.float64(1e-9)
    ).all()
    assert (
        counted <= [(values < edge + 1e-9).sum() for edge in edges[1:]] + np.float64(1e-9)
    ).all()

    if name == "depth":
        np.testing.assert_array_equal(estimated.share, exact.share)
    else:
        # The estimate of trace P_b, P_b a band with smooth edges, is the mean of PROBES numbers
        # z' P_b z, whose variance is twice the sum of squares off P_b's diagonal.
        gains = smooth_bands(np.linspace(0, 1, 9), 32, values / graph.lambda_max)
        for gain, share in zip(gains, estimated.share, strict=True):
            band = (vectors * gain) @ vectors.T
            variance = 2 * np.square(band - np.diag(np.diag(band))).sum() / PROBES
            assert abs(share * len(values) - gain.sum()) <= 4 * np.sqrt(variance)
        # Smooth edges let an eigenvalue leak into the next band.
        counts = np.histogram(values.clip(0), edges)[0] / len(values)
        assert np.abs(estimated.share - counts).max() <= 0.1
    for world_size in (2, 4):
        for others in ranks(world_size).run(densities, name):
            for one, other in zip((exact, estimated), others, strict=True):
                np.testing.assert_allclose(other.share, one.share, atol=1e-5)


def smooth_bands(edges, count, shares):
    """Gain of each band at some frequencies, all as shares of the spectrum; (bands, frequencies).

    The Chebyshev series of a step, damped by the autocorrelation of half a sine (Jackson).
    """
    window = np.sin(np.pi * np.arange(1, count + 1) / (count + 1))
    damping = np.correlate(window, window, "full")[count - 1 :] / (window @ window)
    angle = np.arccos(np.clip(2 * np.asarray(edges) - 1, -1, 1))
    at = np.arccos(np.clip(2 * np.asarray(shares) - 1, -1, 1))
    gains = []
    for high, low in pairwise(angle):
        gain = (high - low) / np.pi * np.ones_like(at)
        for n in range(1, count):
            step = (np.sin(n * high) - np.sin(n * low)) * 2 / (np.pi * n)
            gain += damping[n] * step * np.cos(n * at)
        gains.append(gain)
    return np.array(gains)


def nodes_of(array, kind):
    """(nodes, width)."""
    if kind == "element":
        return array.reshape(-1, 1)
    matrix = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
    return matrix.T if kind == "column" and array.ndim > 1 else matrix


def sketch_of(array, kind, sketch_width):
    """The projection that is documented, by numpy."""
    nodes = nodes_of(array, kind)
    width = nodes.shape[1]
    if sketch_width == 0 or width <= sketch_width:
        return nodes
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(width, sketch_width, dtype=torch.float64, generator=generator)
    return nodes @ draw.numpy() / np.sqrt(sketch_width)


SKETCHED = random_arrays({"a": (7, 13), "b": (11, 13), "c": (13, 5), "d": (4, 3, 5), "e": (9,)})


def sketches_of(kind, alone=False):
    sharded = Sharded(SKETCHED, [Ring()], kind, alone=alone)
    sketches = Sketches(sharded.parameters, sharded.layout, 6, 0, sharded.communicator)
    sketches.take([part * torch.nan for part in sharded.local(SKETCHED)])  # is forgotten
    partial = sketches.take(sharded.local(SKETCHED))
    complete = [part.numpy() for part in sketches.complete(partial)]
    equal = sharded.parameters[: 2 if kind == "row" else 1]
    features = sketches.features(partial, equal).numpy()
    assert not sketches.take([None] * len(sharded.layout.own)).any()
    sizes = {p.name: p.nodes * sketches.columns[p.name] for p in sharded.parameters}
    sketches.layout.check(sizes)
    return list(zip(sketches.layout.own, complete, strict=True)), features


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["row", "column"])
def test_sketches_are_projections_of_the_whole_gradient(ranks, kind, world_size):
    results = [sketches_of(kind, True)]
    if world_size > 1:
        results = ranks(world_size).run(sketches_of, kind)
    expected = {name: sketch_of(array, kind, 6) for name, array in SKETCHED.items()}
    for complete, features in results:
        equal = ("a", "b") if kind == "row" else ("a",)
        np.testing.assert_allclose(
            features, np.concatenate([expected[n] for n in equal]), atol=1e-5
        )
        for fragment, values in complete:
            columns = expected[fragment.parameter].shape[1]
            assert fragment.start % columns == fragment.length % columns == 0
            whole = expected[fragment.parameter].reshape(-1)
            np.testing.assert_allclose(values, whole[fragment.start : fragment.end], atol=1e-5)


BANDS, DECAY, SKETCH = 4, 0.8, 4


def samples_of(name, count=5):
    shapes = {parameter: array.shape for parameter, array in GRAPHS[name][0].items()}
    mean = random_arrays(shapes, 100)
    return [
        {n: mean[n] + g for n, g in random_arrays(shapes, 101 + seed).items()}
        for seed in range(count)
    ]


def observed(name, scale=1.0, bad=(), alone=False):
    """Power, signal and noise after all samples; every entry of `bad` spoils one on a rank."""
    sharded = Sharded(*GRAPHS[name], alone=alone)
    statistics = sharded.statistics(SKETCH, BANDS, DECAY)
    statistics.compare_consecutive()
    for index, sample in enumerate(samples_of(name)):
        for position, value in bad:
            if position == index:
                spoilt = [value * g for g in sharded.local(sample)]
                if sharded.communicator.rank == sharded.communicator.world_size - 1:
                    spoilt[0][0] = torch.nan if value == 1 else torch.inf
                statistics.observe(spoilt, scale)
        gradients = [scale * gradient for gradient in sharded.local(sample)]
        statistics.observe(gradients, scale)
    mean = statistics.running.mean
    features = statistics.sketches.features(mean, sharded.parameters[:1]).numpy()
    found = *statistics.estimate, statistics.consecutive.means
    return statistics.power.numpy(), *(p.numpy() for p in found), features


def weights_of(count):
    weight = DECAY ** np.arange(count)[::-1]
    return weight / weight.sum()


def dense_statistics(name, bad=()):
    """The same by numpy: means with weights DECAY^age, eigenvectors of the dense L."""
    arrays, _, kind, _ = GRAPHS[name]
    graph = Sharded(*GRAPHS[name], alone=True).graph
    samples = samples_of(name)
    weight = weights_of(len(samples))

    def power(sketches):
        total = np.zeros(BANDS)
        for columns in {sketch.shape[1] for sketch in sketches.values()}:
            names = [n for n, sketch in sketches.items() if sketch.shape[1] == columns]
            values, vectors = np.linalg.eigh(graph.laplacian(names).toarray())
            transformed = vectors.T @ np.concatenate([sketches[n] for n in names])
            gains = smooth_bands(np.linspace(0, 1, BANDS + 1), 4 * BANDS, values / graph.lambda_max)
            total += gains @ np.square(transformed).sum(axis=1)
        return total

    sketched = [{n: sketch_of(g, kind, SKETCH) for n, g in s.items()} for s in samples]
    mean = {n: sum(w * s[n] for w, s in zip(weight, sketched, strict=True)) for n in arrays}
    total = sum(w * power(s) for w, s in zip(weight, sketched, strict=True))
    noise = (total - power(mean)) / (1 - np.square(weight).sum())
    flat = [np.concatenate([sketch.ravel() for sketch in s.values()]) for s in sketched]
    broken = {position for position, _ in bad}
    pairs = [(flat[i - 1], flat[i]) for i in range(1, len(flat)) if i not in broken]
    consecutive = [len(pairs)] + [
        weights_of(len(pairs)) @ [each(*pair) for pair in pairs]
        for each in (np.dot, lambda before, now: np.square(now - before).sum() / 2)
    ]
    return total, total - noise, noise, np.array(consecutive), mean[next(iter(arrays))]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["similarity", "columns", "depth"])
def test_statistics_are_those_of_the_dense_spectrum(ranks, name, world_size):
    runs = {
        "usual": (),
        "scaled": (2.0**12,),
        "some not finite": (1.0, ((0, 1.0), (2, 1e30), (4, 1.0))),
    }
    for arguments in runs.values():
        expected = dense_statistics(name, *arguments[1:])
        results = [observed(name, *arguments, alone=True)]
        if world_size > 1:
            results = ranks(world_size).run(observed, name, *arguments)
        for result in results:
            for got, wanted in zip(result, expected, strict=True):
                np.testing.assert_allclose(got, wanted, atol=1e-5 * expected[0].sum())


def smooth_power(graph, edges, transformed, values):
    """Power of a signal in eigenvector coordinates, per band with smooth edges."""
    gains = smooth_bands(edges, 4 * (len(edges) - 1), values / graph.lambda_max)
    return gains @ np.square(transformed).sum(axis=1)


class Stream:
    """Gradients whose signal and noise in each frequency are known."""

    def __init__(self, width):
        arrays = random_arrays({"w": (40, width)}, 7)
        self.sharded = Sharded(arrays, [Similarity(4)], alone=True)
        self.graph = self.sharded.graph
        self.values, self.vectors = np.linalg.eigh(self.graph.laplacian().toarray())
        self.generator = np.random.default_rng(8)
        share = self.values / 2
        self.mean = np.exp(-3 * share)[:, None] * self.generator.standard_normal((40, width))
        self.deviation = 0.2 + share
        edges = np.linspace(0, 1, BANDS + 1)
        self.signal = smooth_power(self.graph, edges, self.mean, self.values)
        spread = np.repeat(self.deviation[:, None], width, axis=1)
        self.noise = smooth_power(self.graph, edges, spread, self.values)

    def sample(self):
        noise = self.deviation[:, None] * self.generator.standard_normal(self.mean.shape)
        return self.sharded.local({"w": self.vectors @ (self.mean + noise)})


def test_estimates_of_signal_and_noise_are_unbiased():
    stream = Stream(6)
    found = []
    for _ in range(150):
        statistics = stream.sharded.statistics(0, BANDS, DECAY)
        for _ in range(4):
            statistics.observe(stream.sample(), 1.0)
        found.append([power.numpy() for power in statistics.estimate])
    estimates = np.array(found)
    standard_error = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert (standard_error < 0.05 * np.array([stream.signal, stream.noise]).max(axis=0)).all()
    difference = estimates.mean(axis=0) - [stream.signal, stream.noise]
    assert (np.abs(difference) <= 4 * standard_error).all()
    # Without the correction for the noise that is left in the mean, signal would be this much off.
    weight = DECAY ** np.arange(4) / (DECAY ** np.arange(4)).sum()
    assert (np.square(weight).sum() * stream.noise > 8 * standard_error[0])[1:].all()


def test_drift_over_the_window_is_no_noise_to_consecutive_samples():
    one, other = np.linalg.qr(np.random.default_rng(0).standard_normal((300, 2)))[0].T
    generator = np.random.default_rng(1)
    turn, deviation = 2 * np.pi / 80, np.sqrt(2 / 300)  # signal 1, noise 2
    arrays = {"w": one.reshape(50, 6)}
    sharded = Sharded(arrays, [Ring()], alone=True)
    statistics = sharded.statistics(0, BANDS, decay=0.99)
    statistics.compare_consecutive()
    for step in range(400):
        mean = np.cos(turn * step) * one + np.sin(turn * step) * other
        sample = mean + deviation * generator.standard_normal(300)
        statistics.observe(sharded.local({"w": sample.reshape(50, 6)}), 1.0)
    _, signal, noise = statistics.consecutive.means.tolist()
    assert signal == pytest.approx(np.cos(turn), rel=0.03)
    assert noise == pytest.approx(2 + 1 - np.cos(turn), rel=0.03)
    # To running means, what has turned by a whole circle is all noise.
    window = statistics.signal_to_noise()
    assert window.signal.sum() < 0.1
    assert window.noise.sum() > 2.9


def saved(part):
    return SavedState("a state", (), part.numbers, (), lambda kind, wanted: [])


def test_saved_means_of_consecutive_samples_go_on_but_for_the_pair_between():
    stream = Stream(6)
    samples = [stream.sample() for _ in range(6)]
    before, after = (stream.sharded.statistics(0, BANDS, DECAY) for _ in range(2))
    for statistics in (before, after):
        statistics.compare_consecutive()
    for sample in samples[:4]:
        before.observe(sample, 1.0)
    after.restore("s", saved(before.state("s")))()
    for sample in samples[4:]:
        after.observe(sample, 1.0)
    flat = [torch.cat(sample).double().numpy() for sample in samples]
    common = [flat[i - 1] @ flat[i] for i in (1, 2, 3, 5)]
    pairs, signal, _ = after.consecutive.means.tolist()
    assert pairs == 4
    assert signal == pytest.approx(weights_of(4) @ common, rel=1e-5)

    older = after.state("s")
    del older.numbers["s.consecutive"]
    before.restore("s", saved(older))()
    assert before.consecutive.means[0] == 3


def test_wiener_gains_come_close_to_the_ideal():
    stream = Stream(50)
    statistics = stream.sharded.statistics(0, BANDS, 0.9995)
    assert wiener_gains(statistics.estimate).tolist() == [1] * BANDS
    statistics.observe(stream.sample(), 1.0)
    assert wiener_gains(statistics.estimate).tolist() == [1] * BANDS
    for _ in range(600):  # in the highest band, signal is 1 % of noise
        statistics.observe(stream.sample(), 1.0)
    ideal = stream.signal / (stream.signal + stream.noise)
    assert ideal.max() - ideal.min() > 0.5
    np.testing.assert_allclose(wiener_gains(statistics.estimate).numpy(), ideal, rtol=0.05)
    found = statistics.signal_to_noise()
    assert found.samples == 601
    np.testing.assert_allclose(found.centers, [1 / 8, 3 / 8, 5 / 8, 7 / 8])
    np.testing.assert_allclose(found.signal, stream.signal, rtol=0.05)
    np.testing.assert_allclose(found.noise, stream.noise, rtol=0.05)
    np.testing.assert_allclose(found.ratio, stream.signal / stream.noise, rtol=0.05)


def test_wiener_gains_stay_between_0_and_1():
    signal = torch.tensor([-1.0, 0.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    noise = torch.tensor([2.0, 0.0, 1.0, -1.0, -2.0], dtype=torch.float64)
    assert wiener_gains(SignalAndNoise(signal, noise)).tolist() == [0, 1, 0.75, 1, 1]


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
def test_whiten_gains_are_a_power_of_power_and_keep_the_total(exponent):
    power = torch.tensor([4.0, 1.0, 0.25, 1e-3], dtype=torch.float64)
    gains = whiten_gains(power, exponent)
    shape = power**-exponent
    np.testing.assert_allclose(gains / gains[0], shape / shape[0], rtol=1e-12)
    assert gains.square() @ power == pytest.approx(float(power.sum()))
    if exponent == 0.5:
        np.testing.assert_allclose(gains.square() * power, power.sum() / 4, rtol=1e-12)


def test_whiten_gains_of_no_power_are_one_and_of_little_are_bounded():
    assert whiten_gains(torch.zeros(3, dtype=torch.float64), 0.5).tolist() == [1, 1, 1]
    little = whiten_gains(torch.tensor([1.0, 0.0, -1e-20], dtype=torch.float64), 0.5)
    assert little.isfinite().all()
    assert little.max() < 1e6


def test_another_graph_forgets_the_powers_by_the_old_one_but_not_the_mean_unless_made_of_it():
    stream = Stream(6)
    samples = [stream.sample() for _ in range(4)]
    statistics = stream.sharded.statistics(0, BANDS, DECAY)
    for sample in samples[:3]:
        statistics.observe(sample, 1.0)
    mean = statistics.running.mean.clone()

    other = Sharded({"w": stream.vectors[:, :6]}, [Ring()], alone=True)
    fresh = other.statistics(0, BANDS, DECAY)
    statistics.use_graph(fresh._spectrometer)
    assert not torch.cat([*statistics.estimate, statistics.power]).any()
    torch.testing.assert_close(statistics.running.mean, mean)
    statistics.observe([gradient * torch.nan for gradient in samples[0]], 1.0)
    assert not torch.cat([*statistics.estimate, statistics.power]).any()

    fresh.observe(samples[3], 1.0)
    statistics.observe(samples[3], 1.0)
    torch.testing.assert_close(statistics.power, fresh.power)
    weight = DECAY ** np.arange(4)[::-1] / (DECAY ** np.arange(4)).sum()
    parts = [
        sum(w * each for w, each in zip(weight.tolist(), runs, strict=True))
        for runs in zip(*samples, strict=True)
    ]
    left = other.statistics(0, BANDS, DECAY)
    left.observe(parts, 1.0)
    torch.testing.assert_close(statistics.running.mean, left.running.mean)
    noise = (fresh.power - left.power) / (1 - np.square(weight).sum())
    torch.testing.assert_close(statistics.estimate.noise, noise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        statistics.estimate.signal, fresh.power - noise, rtol=1e-5, atol=1e-6
    )

    made_of_it = stream.sharded.statistics(0, BANDS, DECAY, keeps_mean=False)
    for sample in samples[:2]:
        made_of_it.observe(sample, 1.0)
    only, other = other.statistics(0, BANDS, DECAY), other
    made_of_it.use_graph(only._spectrometer)
    for sample in samples[2:]:
        only.observe(sample, 1.0)
        made_of_it.observe(sample, 1.0)
    assert (made_of_it.samples, made_of_it.samples_on_graph) == (4, 2)
    for got, wanted in zip(made_of_it.estimate, only.estimate, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("signal", "noise", "gains", "expected"),
    [
        # Kept: (4 + 0.25) / 10 of the signal, (1 + 0.5) / 7 of the noise.
        ([4, 1, 5, 0], [1, 2, 1, 3], [1, 0.5, 0, 0], "separates 42 21 1.98 what the filter keeps"),
        ([3, 3, 3, 3], [1, 1, 1, 1], [1, 1, 0, 0], "does not separate 50 50 1.00 what the filter"),
        ([6, 2, 1, 3], [5, 2, 1, 4], [1, 1, 0, 0], "barely separates 67 58 1.14 what the filter"),
        ([2, 2, 2, 6], [2, 2, 2, 1], [1, 0, 0, 0], "does not separate 17 29 0.58 what the filter"),
        # Alike gains: the lowest eighth, at least one band.
        ([3, 1, 1, 1], [1, 1, 1, 3], [1, 1, 1, 1], "separates 50 17 3.00 the lowest frequencies"),
        ([2, 1] * 8, [1, 1] * 8, [0.7] * 16, "does not separate 12 12 1.00 the lowest frequencies"),
        # Signal without what is kept, nothing kept, and signal without noise.
        ([0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], "does not separate 0 25 0.00 what the filter"),
        ([0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0], "does not separate 0 0 1.00 what the filter"),
        ([1, 3, 0, 0], [0, 1, 1, 1], [0.5, 0, 0, 0], "separates 6 0 at-least-250.00 what the"),
        # Estimates below 0 count as 0.
        ([4, -1, 0, 0], [1, 1, -2, 2], [1, 0, 0, 0], "separates 100 25 4.00 what the filter"),
    ],
)
def test_the_verdict_says_what_the_estimates_do(signal, noise, gains, expected):
    powers = (np.array(each, np.float64) for each in (signal, noise, gains))
    said = verdict(*powers)
    *judgement, of_signal, of_noise, ratio = expected.split(" what ")[0].split(" the ")[0].split()
    assert said.startswith(f"this graph {' '.join(judgement)} signal from noise on this model: ")
    assert "what the filter keeps" in said if " what " in expected else "the lowest freq" in said
    assert f" {of_signal} % of the gradient's signal and {of_noise} % of its noise" in said
    assert f"ratio {ratio.replace('-', ' ')} times the total" in said


def test_kept_over_total_is_finite():
    for signal in np.array([[0, 1], [1, 0], [1, -1], [0, 0]], float):
        for noise in np.array([[0, 1], [1, 0], [1, -1], [0, 0]], float):
            for gains in np.array([[0, 0], [1, 0], [1e-9, 0], [1, 1]], float):
                assert 0 <= kept_over_total(signal, noise, gains) <= 1000


@pytest.mark.parametrize("follows", [False, True])
def test_the_verdict_of_chance_is_that_it_is_too_early(follows):
    signal, noise = np.array([2.0, 0, 0, 2]), np.ones(4)
    gains = np.ones(4) if follows else np.array([1.0, 0, 0, 0])
    # 2 − 1/4 · 4 is beyond chance; its standard error is e · √((3/4)² + 3 · (1/4)²).
    error = 1 / np.sqrt(0.75)
    for share, is_told in ((0.24, True), (0.26, False)):
        said = verdict(signal, noise, gains, share * error * np.ones(4))
        assert ("this graph separates" in said) == is_told
        assert ("too noisy" in said) != is_told


@pytest.mark.parametrize(("signal", "noise"), [([0, -1], [1, 1]), ([1, 1], [0, -1])])
def test_the_verdict_waits_where_there_is_no_signal_or_no_noise(signal, noise):
    said = verdict(np.array(signal), np.array(noise), np.array([1.0, 0.0]))
    assert said == "the gradient is too noisy to tell signal from noise on this graph yet"


class Messages(logging.Handler):
    """What the plugin says about its graph, by the levels that there are."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.verdicts = []

    def emit(self, record):
        if "this graph" in record.getMessage():
            self.verdicts.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("spectral_ds").addHandler(self)
        return self

    def __exit__(self, *failure):
        logging.getLogger("spectral_ds").removeHandler(self)


def verdicts_of_a_run():
    """How many were said after each step, what, and what the plugin knew at the first."""
    section = {
        "graph": {"include": ["*.mlp.gate_proj.*"]},
        # Keeps high frequencies: that this separates nothing needs no significance.
        "filter": {"response": "polynomial", "coefficients": [0.0, 0.5]},
        "monitor": {"interval": 1},
        "statistics": {"interval": 1},
    }
    with Messages() as messages:
        training = Training(CELLS["zero2"], section, rates=(0.5, 0.25))
        said = []
        for index in range(ENOUGH_SAMPLES + 3):
            training.step(index)
            said.append(len(messages.verdicts))
            if index == ENOUGH_SAMPLES - 1:
                snr, metrics = training.plugin.snr(), training.plugin.metrics()
        training.close()
    return dist.get_rank(), said, messages.verdicts, vars(snr), metrics


def test_the_verdict_is_given_once_on_rank_0_after_enough_samples(ranks):
    for rank, said, verdicts, snr, metrics in ranks(2).run(verdicts_of_a_run):
        assert snr["samples"] == ENOUGH_SAMPLES
        signal, noise = np.maximum(snr["signal"], 0), np.maximum(snr["noise"], 0)
        energy = np.square((np.arange(8) + 0.5) / 8)  # λ / 2 on [0, 2], squared
        ratio = (energy @ signal) / (energy @ noise) * noise.sum() / signal.sum()
        # The sentence judges the response; the metric what acts, at strength 0.5.
        acting = np.square(0.5 + 0.5 * (np.arange(8) + 0.5) / 8)
        kept = (acting @ signal) / (acting @ noise) * noise.sum() / signal.sum()
        assert abs(kept - ratio) > 0.01
        assert metrics["signal_to_noise/kept_over_total"] == pytest.approx(kept)
        assert metrics["signal_to_noise/total"] == pytest.approx(
            snr["signal"].sum() / snr["noise"].sum()
        )
        for band in range(8):
            expected = signal[band] / noise[band] if noise[band] > 0 else 0
            assert metrics[f"signal_to_noise/{band}"] == pytest.approx(expected)
        if rank == 0:
            assert said == [0] * (ENOUGH_SAMPLES - 1) + [1] * 4
            [text] = verdicts
            kept = [100 * (energy @ power) / power.sum() for power in (signal, noise)]
            assert f"{kept[0]:.0f} % of the gradient's signal and {kept[1]:.0f} %" in text
            assert f"ratio {ratio:.2f} times" in text
        else:
            assert verdicts == []


BY_GRADIENT = {
    "graph": {
        "edges": [{"family": "similarity", "features": "gradient"}],
        "refresh_interval": 30,
    },
    "statistics": {"interval": 1, "decay": 0.98},
    "filter": {"response": "identity"},
    "monitor": {"interval": 1, "figures_interval": 10**6},
}


class White:
    """Gradients of a few matrices, white signal and white noise, and what the plugin says."""

    SHAPE, BLOCKS = (192, 160), 3

    def __init__(self, section, scale, steps, seed=1):
        rows, width = self.SHAPE
        layers = (torch.nn.Linear(width, rows, bias=False) for _ in range(self.BLOCKS))
        model = torch.nn.Sequential(*layers)
        generator = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randn(self.SHAPE, generator=generator)  # noqa: E731
        self.signal = {name: scale * draw() for name, _ in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with Messages() as messages:
            plugin = spectral_ds.attach(model, optimizer, section)
            self.said = []
            for _ in range(steps):
                for name, weight in model.named_parameters():
                    weight.grad = self.signal[name] + draw()
                optimizer.step()
                self.said.append(len(messages.verdicts))
            self.snr, self.graph, self.metrics = plugin.snr(), plugin.graph, plugin.metrics()
            plugin.detach()
        self.verdicts = messages.verdicts

    def exact(self):
        """Signal and noise by the dense spectrum of the graph in use, at full width."""
        edges = np.linspace(0, 1, len(self.snr.centers) + 1)
        signal, noise = 0, 0
        for name, values in self.signal.items():
            eigenvalues, vectors = np.linalg.eigh(self.graph.laplacian([name]).toarray())
            transformed = vectors.T @ values.double().numpy()
            signal = signal + smooth_power(self.graph, edges, transformed, eigenvalues)
            spread = np.ones(self.SHAPE)
            noise = noise + smooth_power(self.graph, edges, spread, eigenvalues)
        return signal, noise


@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_signal_on_a_graph_of_gradients_looks_no_smoother_than_it_is(scale):
    run = White(BY_GRADIENT, scale, steps=59)  # the 29 since the graph was built tell
    signal, noise = run.exact()
    np.testing.assert_allclose(run.snr.noise, noise, atol=0.05 * noise.max())
    np.testing.assert_allclose(run.snr.signal, signal, atol=0.15 * signal.max())
    low = np.arange(8) < 2
    expected = kept_over_total(signal, noise, low)
    assert 1.3 < expected < 2  # it does not look white: edges join what is alike
    assert kept_over_total(run.snr.signal, run.snr.noise, low) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("response", ["identity", "heat", "wiener", "whiten"])
@pytest.mark.parametrize("seed", range(4))
def test_noise_on_a_graph_of_gradients_is_not_said_to_be_separated(response, seed):
    run = White({**BY_GRADIENT, "filter": {"response": response}}, 0.0, steps=70, seed=seed)
    assert len(run.verdicts) >= 1
    assert all("does not separate" in said or "too noisy" in said for said in run.verdicts)
    # "Too noisy" is said once at most, and something else once at most.
    assert len(run.verdicts) == len({"too noisy" in said for said in run.verdicts})


@pytest.mark.parametrize("features", ["gradient", "weights"])
def test_the_verdict_comes_though_no_graph_lives_for_enough_samples(features):
    graph = {"edges": [{"family": "similarity", "features": features}], "refresh_interval": 5}
    section = {**BY_GRADIENT, "graph": graph, "filter": {"response": "heat"}}
    run = White(section, 1.0, steps=12)
    # The first graph of gradients has no edges.
    after = 10 if features == "gradient" else 5
    assert run.said == [0] * after + [1] * (12 - after)


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
    training = Training(CELLS[name], section)
    plugin = training.plugin
    found = [
        (vars(pairs), plugin.graph.laplacian(pairs.parameters).toarray())
        for pairs in plugin.eigenpairs(4)
    ]
    density = plugin.density(5)
    training.close()
    return found, density, plugin.graph.laplacian().toarray()


@pytest.fixture(scope="module")
def spectra_of_large_groups(ranks):
    """As one process solves them without their dense L."""
    return ranks(1).run(spectra_of_a_run, "plain", 4)[0]


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_the_plugin_solves_groups_too_large_for_a_dense_laplacian(
    ranks, spectra_of_large_groups, name
):
    pairs, alone, _ = spectra_of_large_groups
    results = ranks(4).run(spectra_of_a_run, name, 4)
    both = zip(whole_pairs([found for found, *_ in results]), whole_pairs([pairs]), strict=True)
    for (values, vectors, _, laplacian), (same, *_) in both:
        assert len(laplacian) > 4
        np.testing.assert_allclose(values, np.linalg.eigvalsh(laplacian)[:4], atol=1e-9)
        np.testing.assert_allclose(values, same, atol=1e-9)
        assert np.linalg.norm(laplacian @ vectors - vectors * values, axis=0).max() <= 1e-5
    for _, density, laplacian in results:
        np.testing.assert_allclose(density.share, alone.share, atol=1e-6)
        counts = np.histogram(np.linalg.eigvalsh(laplacian).clip(0), np.linspace(0, 2, 6))[0]
        exact = counts / len(laplacian)
        assert 0 < np.abs(density.share - exact).max() <= 0.1  # an estimate


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_the_plugin_gives_eigenpairs_and_density(ranks, name):
    results = ranks(2).run(spectra_of_a_run, name)
    for values, vectors, _, laplacian in whole_pairs([found for found, *_ in results]):
        assert len(values) == 4
        np.testing.assert_allclose(values, np.linalg.eigvalsh(laplacian)[:4], atol=1e-9)
        assert np.abs(laplacian @ vectors - vectors * values).max() <= 1e-9
    for _, density, laplacian in results:
        values = np.linalg.eigvalsh(laplacian).clip(0)
        counts = np.histogram(values, np.linspace(0, 2, 6))[0]
        np.testing.assert_allclose(density.share, counts / len(laplacian), atol=1e-12)


@pytest.fixture(scope="module")
def plain_plugin():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
    section = {"graphs": [{}, {"node": "column"}, {}]}
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), section)
    yield plugin
    plugin.detach()


@pytest.mark.parametrize(
    ("method", "argument", "value"),
    [
        *(("eigenpairs", "k", value) for value in (0, -1, 2.5)),
        *(("density", "bins", value) for value in (0, -1, 2.5)),
        *((m, "graph", value) for m in ("eigenpairs", "density", "snr") for value in (3, -1)),
    ],
)
def test_an_impossible_argument_is_named_with_its_value(plain_plugin, method, argument, value):
    arguments = {"eigenpairs": {"k": 2}, "density": {"bins": 2}, "snr": {}}[method]
    getattr(plain_plugin, method)(**arguments, graph=1)
    with pytest.raises(ValueError, match=rf"^{argument} = {value}: must be"):
        getattr(plain_plugin, method)(**{**arguments, argument: value})
