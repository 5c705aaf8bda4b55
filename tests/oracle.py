"""The dense float64 oracle: DESIGN's rules from full weights, with numpy and scipy alone.

Shares no code with the package. Nodes are the rows of the chosen parameters, parameter after
parameter; W is dense; h(L) comes from the eigendecomposition.
"""

import re

import numpy as np
import scipy.linalg
import torch


def as_rows(array):
    """(rows, width): one row a node; 0-D and 1-D parameters are one node."""
    array = np.asarray(array, np.float64)
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


def numbering(arrays):
    """Number of each array's first node, and the number of all nodes."""
    first, total = {}, 0
    for name, array in arrays.items():
        first[name] = total
        total += len(as_rows(array))
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


def similarity_adjacency(weights, neighbours=8, scope="parameter", sketch_width=64, seed=0):
    names = list(weights)
    first, total = numbering(weights)
    scopes = {}
    for name in names:
        width = as_rows(weights[name]).shape[1]
        key = name if scope == "parameter" else (role_and_block(name)[0], width)
        scopes.setdefault(key, []).append(name)
    adjacency = np.zeros((total, total))
    for members in scopes.values():
        node = np.concatenate([first[n] + np.arange(len(as_rows(weights[n]))) for n in members])
        feature = np.concatenate([as_rows(weights[n]) for n in members])
        if sketch_width and feature.shape[1] > sketch_width:
            feature = feature @ projection(feature.shape[1], sketch_width, seed)
        norm = np.linalg.norm(feature, axis=1)
        pairs = []
        for i in range(len(node)):
            others = [j for j in range(len(node)) if j != i and norm[i] > 0 and norm[j] > 0]
            cosine = {
                j: float(np.round(feature[i] @ feature[j] / (norm[i] * norm[j]), 9)) for j in others
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


def depth_adjacency(weights):
    names = list(weights)
    first, total = numbering(weights)
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
            for row in range(len(as_rows(weights[name]))):
                a, b = first[name] + row, first[following] + row
                adjacency[a, b] = adjacency[b, a] = 1.0
    return adjacency


def adjacency_of(weights, edges, seed=0):
    """W = sum over families, from the `edges` list of the configuration."""
    total = 0
    for edge in edges:
        edge = dict(edge)
        factor = edge.pop("weight", 1.0)
        if edge.pop("family") == "depth":
            total = total + factor * depth_adjacency(weights)
        else:
            edge.pop("features", None)
            total = total + factor * similarity_adjacency(weights, seed=seed, **edge)
    return total


def laplacian_of(adjacency, kind="normalized"):
    degree = adjacency.sum(axis=1)
    if kind == "combinatorial":
        return np.diag(degree) - adjacency
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    return np.diag((degree > 0) * 1.0) - scale[:, None] * adjacency * scale[None, :]


def apply_function(laplacian, function, gradients):
    """f(L) X by eigendecomposition, width class by width class; `gradients` by name."""
    values, vectors = scipy.linalg.eigh(laplacian)
    matrix = (vectors * function(values)) @ vectors.T
    return _by_width(matrix, gradients)


def _by_width(matrix, gradients):
    names = list(gradients)
    rows = {n: as_rows(gradients[n]) for n in names}
    first, _ = numbering(gradients)
    result = {}
    for width in {r.shape[1] for r in rows.values()}:
        members = [n for n in names if rows[n].shape[1] == width]
        node = np.concatenate([first[n] + np.arange(len(rows[n])) for n in members])
        signal = np.concatenate([rows[n] for n in members])
        filtered = matrix[np.ix_(node, node)] @ signal
        position = 0
        for n in members:
            result[n] = filtered[position : position + len(rows[n])].reshape(np.shape(gradients[n]))
            position += len(rows[n])
    return {n: result[n] for n in names}


def response_of(settings):
    """(1 - s) + s h(λ) from the `filter` section of the configuration."""
    strength = settings.get("strength", 0.5)
    name = settings["response"]
    h = {
        "identity": lambda v: np.ones_like(v),
        "heat": lambda v: np.exp(-settings.get("tau", 1.0) * v),
        "tikhonov": lambda v: 1 / (1 + settings.get("tau", 1.0) * v),
        "window": lambda v: 1 - settings.get("alpha", 0.4) / 2 * v,
        "polynomial": lambda v: sum(c * v**k for k, c in enumerate(settings["coefficients"])),
    }[name]
    return lambda v: (1 - strength) + strength * h(v)
