"""Graphs of made-up parameters on the ranks of a pool, or in this process alone.

Parameters lie one after another, cut at awkward places; some ranks own nothing. And what dense
numpy makes of signals on them.
"""

from itertools import pairwise

import numpy as np
import torch

from spectral_ds.graph import Depth, ParameterNodes, Ring, Similarity
from spectral_ds.laplacian import ParameterGraph, Work, plan_operators
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches import Sketches, WeightFeatures
from spectral_ds.spectrum import (
    GradientStatistics,
    Spectrometer,
)

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
            "work": Work(hops=1, transposes=2),
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


def by_dense_laplacian(graph, kind, function, signal):
    """f(L) X by numpy; equal widths together."""
    result = {}
    nodes = {name: nodes_of(array, kind) for name, array in signal.items()}
    for width in {each.shape[1] for each in nodes.values()}:
        names = [name for name, each in nodes.items() if each.shape[1] == width]
        values, vectors = np.linalg.eigh(graph.laplacian(names).toarray())
        matrix = (vectors * function(values)) @ vectors.T
        filtered = matrix @ np.concatenate([nodes[name] for name in names])
        for name in names:
            own, filtered = np.split(filtered, [len(nodes[name])])
            is_transposed = kind == "column" and signal[name].ndim > 1
            result[name] = (own.T if is_transposed else own).reshape(signal[name].shape)
    return result


def smooth_power(graph, edges, transformed, values):
    """Power of a signal in eigenvector coordinates, per band with smooth edges."""
    gains = smooth_bands(edges, 4 * (len(edges) - 1), values / graph.lambda_max)
    return gains @ np.square(transformed).sum(axis=1)
