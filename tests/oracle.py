"""The dense float64 oracle: DESIGN's rules from full weights, with numpy and scipy alone.

Shares no code with the package. Nodes are the rows, columns or elements of the chosen parameters,
parameter after parameter; W is dense; h(L) comes from the eigendecomposition.
"""

import functools
import hashlib
import re

import numpy as np
import scipy.linalg
import torch

KEYS = [("q_proj", "k_proj"), ("gate_proj", "up_proj")]


def remembered(function):
    """Keeps results by the content of the arguments: many tests begin with the same weights."""
    results = {}

    def content(value):
        if isinstance(value, dict):
            return tuple((name, content(each)) for name, each in value.items())
        if isinstance(value, np.ndarray):
            return value.shape, value.dtype.str, hashlib.sha256(value.tobytes()).digest()
        return repr(value)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        key = content(dict(enumerate(args))), content(kwargs)
        if key not in results:
            results[key] = function(*args, **kwargs)
        return results[key]

    return wrapper


def as_nodes(array, kind="row"):
    """(nodes, width): one row a node; 0-D and 1-D parameters are one node, unless by element."""
    array = np.asarray(array, np.float64)
    if kind == "element":
        return array.reshape(-1, 1)
    matrix = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
    return matrix.T if kind == "column" and array.ndim > 1 else matrix


def from_nodes(matrix, shape, kind="row"):
    """Undoes `as_nodes`."""
    is_transposed = kind == "column" and len(shape) > 1
    return (matrix.T if is_transposed else matrix).reshape(shape)


def numbering(arrays, kind="row"):
    """Number of each array's first node, and the number of all nodes."""
    first, total = {}, 0
    for name, array in arrays.items():
        first[name] = total
        total += len(as_nodes(array, kind))
    return first, total


def role_and_block(name):
    match = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if match is None:
        return name, None
    return name[: match.start(1)] + "*" + name[match.end(1) :], int(match.group(1))


def projection(width, sketch_width, seed):
    """The documented draw: N(0, 1/sketch_width), torch's CPU generator, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(width, sketch_width, dtype=torch.float64, generator=generator)
    return draw.numpy() / np.sqrt(sketch_width)


def similarity_adjacency(
    weights, kind, neighbours=8, scope="parameter", sketch_width=64, seed=0, features=None
):
    """`weights` are what is compared: weights, or mean gradients."""
    digits = 6 if features == "gradient" else 9
    names = list(weights)
    first, total = numbering(weights, kind)
    scopes = {}
    for name in names:
        width = as_nodes(weights[name], kind).shape[1]
        key = name if scope == "parameter" else (role_and_block(name)[0], width)
        scopes.setdefault(key, []).append(name)
    adjacency = np.zeros((total, total))
    for members in scopes.values():
        rows = {n: as_nodes(weights[n], kind) for n in members}
        node = np.concatenate([first[n] + np.arange(len(rows[n])) for n in members])
        feature = np.concatenate([rows[n] for n in members])
        if sketch_width and feature.shape[1] > sketch_width:
            feature = feature @ projection(feature.shape[1], sketch_width, seed)
        norm = np.linalg.norm(feature, axis=1)
        pairs = []
        for i in range(len(node)):
            others = [j for j in range(len(node)) if j != i and norm[i] > 0 and norm[j] > 0]
            cosine = {
                j: float(np.round(feature[i] @ feature[j] / (norm[i] * norm[j]), digits))
                for j in others
            }
            others.sort(key=lambda j: (-cosine[j], j))
            pairs += [(i, j, 2 * (1 - cosine[j])) for j in others[:neighbours]]
        if not pairs:
            continue
        variance = np.mean([d for _, _, d in pairs])
        for i, j, d in pairs:
            w = np.exp(-d / (2 * variance)) if variance > 0 else 1.0
            a, b = node[i], node[j]
            adjacency[a, b] = adjacency[b, a] = max(adjacency[a, b], w)
    return adjacency


def depth_adjacency(weights, kind):
    names = list(weights)
    first, total = numbering(weights, kind)
    adjacency = np.zeros((total, total))
    for name in names:
        role, block = role_and_block(name)
        later = [
            (role_and_block(other)[1], other)
            for other in names
            if block is not None
            and role_and_block(other)[0] == role
            and np.shape(weights[other]) == np.shape(weights[name])
            and role_and_block(other)[1] > block
        ]
        if later:
            _, following = min(later)
            for row in range(len(as_nodes(weights[name], kind))):
                a, b = first[name] + row, first[following] + row
                adjacency[a, b] = adjacency[b, a] = 1.0
    return adjacency


def ring_adjacency(weights, kind):
    first, total = numbering(weights, kind)
    adjacency = np.zeros((total, total))
    for name in weights:
        count = len(as_nodes(weights[name], kind))
        for row in range(count):
            following = (row + 1) % count
            if following != row:
                a, b = first[name] + row, first[name] + following
                adjacency[a, b] = adjacency[b, a] = 1.0
    return adjacency


def pair_adjacency(weights, kind, head_width):
    """Element (i, j) of a query meets element (i', j) of its key, where i' is i's row in its group;
    nodes are joined if elements of theirs are."""
    first, total = numbering(weights, kind)
    adjacency = np.zeros((total, total))
    for query, key in KEYS:
        for name in weights:
            other = name.replace(query, key)
            if query not in name or other not in weights:
                continue
            a, b = np.asarray(weights[name]), np.asarray(weights[other])
            is_grouped = a.shape != b.shape
            if is_grouped and (a.ndim < 2 or kind == "column"):
                continue
            number_a = from_nodes(node_numbers(a, kind), a.shape, kind)
            number_b = from_nodes(node_numbers(b, kind), b.shape, kind)
            for i in range(a.shape[0]):
                row = i
                if is_grouped:
                    head, within = divmod(i, head_width)
                    row = head // (a.shape[0] // b.shape[0]) * head_width + within
                for x, y in zip(np.ravel(number_a[i]), np.ravel(number_b[row]), strict=True):
                    u, v = first[name] + int(x), first[other] + int(y)
                    adjacency[u, v] = adjacency[v, u] = 1.0
    return adjacency


def node_numbers(array, kind):
    """For each element, the number of its node; laid out as `as_nodes`."""
    nodes = as_nodes(array, kind)
    return np.repeat(np.arange(len(nodes))[:, None], nodes.shape[1], axis=1)


@remembered
def adjacency_of(weights, edges, seed=0, kind="row", head_width=None, mean_gradients=None):
    """W = sum over families, from the `edges` list of the configuration."""
    total = 0
    for edge in edges:
        edge = dict(edge)
        factor = edge.pop("weight", 1.0)
        family = edge.pop("family")
        if family == "depth":
            part = depth_adjacency(weights, kind)
        elif family == "ring":
            part = ring_adjacency(weights, kind)
        elif family == "pair":
            part = pair_adjacency(weights, kind, head_width)
        else:
            compared = mean_gradients if edge.get("features") == "gradient" else weights
            part = similarity_adjacency(compared, kind, seed=seed, **edge)
        total = total + factor * part
    return total


def laplacian_of(adjacency, kind="normalized"):
    degree = adjacency.sum(axis=1)
    if kind == "combinatorial":
        return np.diag(degree) - adjacency
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    return np.diag((degree > 0) * 1.0) - scale[:, None] * adjacency * scale[None, :]


def bound_of(adjacency, kind="normalized"):
    """The documented upper bound of the eigenvalues."""
    return 2.0 if kind == "normalized" else 2 * adjacency.sum(axis=1).max()


@remembered
def eigenvectors_of(laplacian):
    return scipy.linalg.eigh(laplacian)


def apply_function(laplacian, function, gradients, kind="row"):
    """f(L) X by eigendecomposition, width class by width class; `gradients` by name."""
    values, vectors = eigenvectors_of(laplacian)
    matrix = (vectors * function(np.maximum(values, 0))) @ vectors.T
    return _by_width(matrix, gradients, kind)


def _by_width(matrix, gradients, kind):
    names = list(gradients)
    rows = {n: as_nodes(gradients[n], kind) for n in names}
    first, _ = numbering(gradients, kind)
    result = {}
    for width in {r.shape[1] for r in rows.values()}:
        members = [n for n in names if rows[n].shape[1] == width]
        node = np.concatenate([first[n] + np.arange(len(rows[n])) for n in members])
        signal = np.concatenate([rows[n] for n in members])
        filtered = matrix[np.ix_(node, node)] @ signal
        position = 0
        for n in members:
            part = filtered[position : position + len(rows[n])]
            result[n] = from_nodes(part, np.shape(gradients[n]), kind)
            position += len(rows[n])
    return {n: result[n] for n in names}


def step_response(edges, gains, order):
    """Jackson-damped Chebyshev expansion of a step function; a function of x in [-1, 1].

    Jackson's factors are the autocorrelation of a sine (Weiße et al. 2006, eq. 71); the
    coefficients of the step are integrals over θ = arccos x.
    """
    count = order + 1
    window = np.sin(np.pi * np.arange(1, count + 1) / (count + 1))
    damping = np.array([window[: count - n] @ window[n:] for n in range(count)])
    damping /= damping[0]
    theta = np.arccos(2 * np.asarray(edges, np.float64) - 1)
    n = np.arange(1, count)
    coefficients = np.zeros(count)
    for gain, upper, lower in zip(gains, theta[:-1], theta[1:], strict=True):
        coefficients[0] += gain * (upper - lower) / np.pi
        coefficients[1:] += gain * 2 / np.pi * (np.sin(n * upper) - np.sin(n * lower)) / n
    return lambda x: np.polynomial.chebyshev.chebval(x, coefficients * damping)


def response_of(settings, bound=2.0):
    """(1 - s) + s h(λ) from the `filter` section of the configuration."""
    strength = settings.get("strength", 0.5)
    name = settings["response"]
    cutoff = settings.get("cutoff", 0.25)
    low, high, gains = settings.get("low", 0.0), settings.get("high", 0.5), settings.get("gains")
    steps = {
        "lowpass": ([0, cutoff, 1], [1, 0]),
        "highpass": ([0, cutoff, 1], [0, 1]),
        "bandpass": ([0, low, high, 1], [0, 1, 0]),
        "bands": (np.linspace(0, 1, len(gains or []) + 1), gains),
    }
    if name in steps:
        step = step_response(*steps[name], settings["order"])
        return lambda v: (1 - strength) + strength * step(2 * v / bound - 1)
    h = {
        "identity": lambda v: np.ones_like(v),
        "heat": lambda v: np.exp(-settings.get("tau", 1.0) * v),
        "tikhonov": lambda v: 1 / (1 + settings.get("tau", 1.0) * v),
        "window": lambda v: 1 - settings.get("alpha", 0.4) / 2 * v,
        "polynomial": lambda v: sum(c * v**k for k, c in enumerate(settings["coefficients"])),
    }[name]
    return lambda v: (1 - strength) + strength * h(v)
