"""One graph of activations: what it stores, computes and sends, before anything has been looked at.

What enters the layers is not known from shapes, and need not be: all costs follow from the number
of inputs and of directions. Which matrices share a graph is told by names; see `shared_inputs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spectral_ds.coactivation import is_exact, sketch_columns
from spectral_ds.config import EdgeConfig, SpectralConfig
from spectral_ds.geometry.buckets import below_shard
from spectral_ds.graph import ParameterNodes
from spectral_ds.planning.costs import Cost
from spectral_ds.planning.cut_rows import CutMatrices, cut_matrices
from spectral_ds.planning.flows import FLOAT, Cluster, Floats, Flow
from spectral_ds.planning.layouts import Cuts
from spectral_ds.planning.shared_inputs import by_shared_input
from spectral_ds.stack.choices import GraphChoice
from spectral_ds.stack.responses import choose_transfers

DOUBLE = 8  # bytes of a float64


@dataclass(frozen=True, eq=False)
class PlannedCoactivation:
    """The graphs of a model's layers, and what a step takes of each rank.

    Attributes:
        parameters: all that it covers.
        groups: those with inputs; parameters of one group share theirs.
        edge: the settings.
        columns: numbers of a cut row that travel.
        cut: rows that shard boundaries cut.
        nodes: inputs of the layers that a rank has a part of; (world size,).
        memory: bytes by what for; by rank.
        calibration: bytes on each rank's device while activations are looked at.
        filter, penalty: what they cost at a step where they act; None if they never do.
    """

    parameters: tuple[ParameterNodes, ...]
    groups: tuple[tuple[ParameterNodes, ...], ...]
    edge: EdgeConfig
    columns: int
    cut: CutMatrices
    nodes: Floats
    memory: dict[str, Floats]
    calibration: int
    filter: Cost | None
    penalty: Cost | None

    @property
    def graphs(self) -> tuple[int, int]:
        """How many graphs there are: expected, and if no two matrices share their input."""
        expected = sum(group[0].matrices for group in self.groups)
        return expected, sum(p.matrices for group in self.groups for p in group)

    @property
    def all_nodes(self) -> int:
        """Inputs of all layers; those that share them count once."""
        return sum(group[0].nodes for group in self.groups)

    @property
    def edges_held(self) -> Floats:
        """None: pairs of inputs are not stored."""
        return np.zeros_like(self.nodes)

    @property
    def hop(self) -> Flow:
        """Nothing: there are no products with L."""
        return self.cut.flow * 0

    @property
    def transpose(self) -> Flow:
        """Nothing is transposed."""
        return self.cut.flow * 0

    @property
    def bytes_per_transpose(self) -> int:
        return 0

    @property
    def evaluations(self) -> int:
        """How often rows that shard boundaries cut are added up at a step."""
        return sum(c is not None and c.flow.total > 0 for c in (self.filter, self.penalty))

    @property
    def bytes_per_evaluation(self) -> int:
        """Bytes that all ranks send each time that a function is evaluated."""
        return FLOAT * self.columns * self.cut.flow.total


def plan_coactivation(
    choice: GraphChoice,
    config: SpectralConfig,
    cuts: Mapping[str, Cuts],
    cluster: Cluster,
    bucket_elements: int,
    with_inputs: frozenset[str],
) -> PlannedCoactivation:
    """What a graph of activations takes of each rank.

    Args:
        with_inputs: the parameters of the model that multiply activations, by name.
    """
    parameters = [p for p in choice.parameters if p.name in with_inputs]
    edge, groups = choice.settings.edges[0], by_shared_input(parameters)
    inputs = max((parameter.nodes_of_matrix for parameter in parameters), default=1)
    columns = min(edge.rank * (2 if edge.learn != "none" else 1), inputs)
    elements = sum(parameter.numel for parameter in parameters)
    at_once = below_shard(bucket_elements, elements, cluster.world_size)
    cut = cut_matrices(parameters, cuts, cluster, at_once)
    rows = np.maximum(cut.rows_at_once, 1)
    # λ_max is not known: it bounds what a response is evaluated on, and says nothing of its cost.
    transfers = choose_transfers(config, 1.0, False, torch.device("cpu"), is_exact=True)
    acts = config.filter.strength > 0 and not transfers.filter.is_identity
    has_penalty = transfers.penalty is not None
    held = _held(groups, edge.rank, columns, cuts, cluster)
    stages = config.monitor.enabled or has_penalty or (acts and _moves(config))
    memory = {
        "scratch": FLOAT * _scratch(cut, rows, columns, stages),
        **_directions(groups, edge, held, acts, has_penalty),
    }
    owned = _elements(parameters, cuts, cluster)
    parts = [_cost(owned, columns, rows, cut, columns)] if acts else []
    if config.filter.strength > 0 and config.filter.rest != 1:
        others = [p for p in choice.parameters if p.name not in with_inputs]
        parts.append(Cost.of_elements(_elements(others, cuts, cluster), 2 * FLOAT, cluster))
    known = min(edge.rank, inputs)
    return PlannedCoactivation(
        tuple(choice.parameters),
        tuple(groups),
        edge,
        columns,
        cut,
        held.inputs,
        memory,
        _calibration(groups, edge.rank),
        sum(parts[1:], parts[0]) if parts else None,
        _cost(owned, known, rows, cut, columns) if has_penalty else None,
    )


def _moves(config: SpectralConfig) -> bool:
    """Whether weights are moved without an update in between; see `StackedFilter.move`."""
    settings = config.filter
    is_alone = len(config.stack) == 1 and settings.temporal is None
    return is_alone and settings.rescale == "none" and settings.apply_to == "update"


def _scratch(cut: CutMatrices, rows: Floats, columns: int, stages: bool) -> Floats:
    """Numbers of products, of parts of cut rows, and of copies of rows where some are made."""
    return np.asarray((cut.rows + rows + cut.flow.sent) * columns + cut.largest * stages)


def _directions(
    groups: Sequence[Sequence[ParameterNodes]],
    edge: EdgeConfig,
    held: "_Held",
    acts: bool,
    has_penalty: bool,
) -> dict[str, Floats]:
    """Bytes of directions: on the device those of what a rank holds, all of them on its host."""
    copies = 1.0 * held.known  # U, which all share that act by R alone
    if acts:
        copies = copies + held.of_filter * (1 if edge.learn == "none" else 2)  # Q; P and Q
    if has_penalty:
        copies = copies + 2 * held.known  # Q, and Q of the step's learning rate
    known = sum(p.nodes * min(edge.rank, p.nodes_of_matrix) for p, *_ in groups)
    sources = 1 if edge.learn == "none" else 2
    on_host = np.full_like(copies, FLOAT * known * sources)
    return {"directions": FLOAT * copies, "known directions": on_host}


def _calibration(groups: Sequence[Sequence[ParameterNodes]], rank: int) -> int:
    """Bytes of sums over activations, and of what they are projected on."""
    lengths = {group[0].nodes_of_matrix for group in groups}
    columns = {n: n if is_exact(n, rank) else sketch_columns(rank) for n in lengths}
    sums = sum(p.nodes * columns[p.nodes_of_matrix] for p, *_ in groups)
    omegas = sum(n * columns[n] for n in lengths if not is_exact(n, rank))
    return DOUBLE * sums + FLOAT * omegas


@dataclass(frozen=True)
class _Held:
    """What ranks have a part of; (world size,) each.

    Attributes:
        inputs: of their graphs.
        known, of_filter: numbers of the directions that are known, and of those of the filter.
    """

    inputs: Floats
    known: Floats
    of_filter: Floats


def _held(
    groups: Sequence[Sequence[ParameterNodes]],
    rank: int,
    columns: int,
    cuts: Mapping[str, Cuts],
    cluster: Cluster,
) -> _Held:
    inputs, known, of_filter = (np.zeros(cluster.world_size) for _ in range(3))
    for group in groups:
        first = group[0]
        matrices = _matrices_of(group, cuts, cluster)
        n = first.nodes_of_matrix
        inputs += matrices * n
        known += matrices * n * min(rank, n)
        of_filter += matrices * n * min(columns, n)
    return _Held(inputs, known, of_filter)


def _matrices_of(
    group: Sequence[ParameterNodes], cuts: Mapping[str, Cuts], cluster: Cluster
) -> Floats:
    """Of how many of a group's matrices each rank has a part."""
    size = group[0].matrices
    has_any = np.zeros((cluster.world_size, size), bool)
    for parameter in group:
        cut, each = cuts[parameter.name], parameter.numel // size
        first, last = cut.bounds[:-1] // each, (cut.bounds[1:] - 1) // each
        for rank, low, high in zip(cut.rank, first, last, strict=True):
            has_any[rank, low : high + 1] = True
    return np.asarray(has_any.sum(axis=1, dtype=np.float64))


def _elements(
    parameters: Sequence[ParameterNodes], cuts: Mapping[str, Cuts], cluster: Cluster
) -> Floats:
    """Of some parameters, by rank."""
    found = np.zeros(cluster.world_size)
    for parameter in parameters:
        cut = cuts[parameter.name]
        found += cluster.by_rank(cut.rank, np.diff(cut.bounds))
    return found


def _cost(elements: Floats, directions: int, rows: Floats, cut: CutMatrices, columns: int) -> Cost:
    """X ← c X + (X P) Q, some rows after others: two products, X read and written, P and Q read."""
    flow = cut.flow * (FLOAT * columns)
    return Cost(
        flow,
        4 * directions * elements,
        FLOAT * elements * (2 + 2 * directions / rows) + 4 * flow.sent,
        2 if flow.total > 0 else 0,
    )
