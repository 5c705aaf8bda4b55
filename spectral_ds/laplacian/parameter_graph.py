"""ParameterGraph: the weighted graph over all chosen parameters, sharded like them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array, eye_array

from spectral_ds.graph import EdgeFamily, Edges, ParameterNodes
from spectral_ds.laplacian.adjacency import RowOwners, build_adjacency, degrees
from spectral_ds.laplacian.block import LocalBlock
from spectral_ds.laplacian.buckets import Bucket, make_buckets
from spectral_ds.laplacian.exchange import BoundaryExchange
from spectral_ds.laplacian.kernels import KernelName, make_kernel
from spectral_ds.laplacian.operator import LaplacianOperator, chebyshev_block, laplacian_rows
from spectral_ds.sharding import Communicator, ShardLayout


def sample_stride(width: int) -> int:
    """Spectra of wide rows are measured on every 8th column, of narrow ones on all.

    Columns are filtered independently, so a sample of them has the spectrum of all, up to
    sampling error, at an eighth of the cost.
    """
    return 8 if width >= 512 and width % 8 == 0 else 1


@dataclass(frozen=True)
class ShardedBucket:
    """One bucket's graph as this rank holds it.

    Attributes:
        edges: edges from the rows that this rank owns a part of.
        degree: (nodes,): degree of every node of the bucket.
        primary_rows: the rows whose first element this rank owns; each row has one such rank.
    """

    bucket: Bucket
    edges: Edges
    degree: npt.NDArray[np.float64]
    owners: RowOwners
    primary_rows: npt.NDArray[np.int64]


class ParameterGraph:
    """Nodes, edges and Laplacian of the parameters that the plugin filters.

    Made by `ParameterGraph.build`. Counts are global and equal on all ranks.

    Attributes:
        parameters: name and shape of every parameter in the graph, in model order.
        num_nodes: number of nodes.
        num_edges: number of undirected edges.
        lambda_max: upper bound of the Laplacian's eigenvalues: 2 if normalized, else
            Gershgorin's bound 2 · max degree (1 if there are no edges).
        normalized: which Laplacian.
        operators: one `LaplacianOperator` a bucket, in the same order on all ranks.
        sampled_operators: the same for a sample of the columns, for measuring spectra.
        bytes_per_hop: bytes that all ranks together send for one hop over all buckets.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterNodes],
        buckets: Sequence[ShardedBucket],
        layout: ShardLayout,
        normalized: bool,
        kernel: KernelName,
        communicator: Communicator,
        everyone: Communicator,
    ) -> None:
        self.parameters = tuple(parameters)
        self.normalized = normalized
        self.num_nodes = sum(parameter.rows for parameter in parameters)
        self._buckets = buckets
        self._communicator = communicator
        self._max_degree = max((float(b.degree.max(initial=0)) for b in buckets), default=0.0)
        self.lambda_max = 2.0 if normalized else 2 * self._max_degree or 1.0
        made = [self._make_operators(bucket, layout, kernel, everyone) for bucket in buckets]
        self.operators = [operator for operator, _ in made]
        self.sampled_operators = [sampled for _, sampled in made]
        counts = torch.tensor(
            [
                sum(int(np.isin(b.edges.source, b.primary_rows).sum()) for b in buckets),
                4 * sum(operator.elements_sent for operator in self.operators),
            ],
            device=communicator.device,
        )
        directed_edges, self.bytes_per_hop = communicator.sum_(counts).tolist()
        self.num_edges = directed_edges // 2

    @classmethod
    def build(
        cls,
        parameters: Sequence[ParameterNodes],
        families: Sequence[EdgeFamily],
        layout: ShardLayout,
        weights: Sequence[torch.Tensor],
        communicator: Communicator,
        everyone: Communicator,
        *,
        normalized: bool,
        kernel: KernelName,
        bucket_elements: int,
        seed: int,
        progress: Callable[[int], object],
    ) -> "ParameterGraph":
        """Build the graph and the operators (collective on the communicator's group).

        Args:
            parameters: the parameters to cover, in model order, equal on all ranks.
            families: edge families.
            layout: the fragments of all ranks.
            weights: this rank's reference weights, flat, in the order of `layout.own`.
            communicator: the ranks that share the parameters.
            everyone: all ranks; more than those if parameters are replicated.
            normalized: the normalized or the combinatorial Laplacian.
            kernel: the multiply kernel.
            bucket_elements: parameters are packed into buckets of at most this size.
            seed: of the random projections.
            progress: called with the number of parameters done since the last call.
        """
        sharded = []
        for bucket in make_buckets(parameters, families, bucket_elements):
            owners = RowOwners.of(bucket, layout)
            edges = build_adjacency(bucket, families, layout, owners, weights, seed, communicator)
            degree = degrees(bucket, edges, owners, communicator)
            rows = np.arange(bucket.nodes)
            primary_rows = rows[owners.primary(rows) == communicator.rank]
            sharded.append(ShardedBucket(bucket, edges, degree, owners, primary_rows))
            progress(len(bucket.parameters))
        return cls(parameters, sharded, layout, normalized, kernel, communicator, everyone)

    def _make_operators(
        self,
        sharded: ShardedBucket,
        layout: ShardLayout,
        kernel: KernelName,
        everyone: Communicator,
    ) -> tuple[LaplacianOperator, LaplacianOperator]:
        """The operator on all columns and the one on a sample, which share the local block of L."""
        bucket, communicator = sharded.bucket, self._communicator
        block = LocalBlock.of(bucket, layout.own, sharded.edges)
        exchange = BoundaryExchange.plan(block, sharded.owners, communicator)
        rows = laplacian_rows(sharded.edges, sharded.degree, block.own_rows, self.normalized)
        matrix = chebyshev_block(rows, block, self.lambda_max)
        multiply = make_kernel(kernel, matrix, bucket.width, everyone)
        operator = LaplacianOperator(block, exchange, multiply)
        stride = sample_stride(bucket.width)
        if stride == 1:
            return operator, operator
        sample = block.sampled(layout.own, stride)
        sample_exchange = BoundaryExchange.plan(
            sample, sharded.owners.sampled(stride), communicator
        )
        return operator, LaplacianOperator(sample, sample_exchange, multiply)

    def describe(self) -> str:
        """One paragraph for people: size, degree, Laplacian, buckets, kernels, exchange."""
        kernels = sorted({op.kernel.name for op in self.operators if op.kernel is not None})
        exchanging = sum(operator.exchange is not None for operator in self.operators)
        kind = "normalized" if self.normalized else "combinatorial"
        mean_degree = 2 * self.num_edges / self.num_nodes
        return (
            f"{self.num_nodes:,} nodes and {self.num_edges:,} edges over "
            f"{len(self.parameters)} parameters, mean degree {mean_degree:.1f} edges; {kind} "
            f"Laplacian, eigenvalues in [0, {self.lambda_max:.4g}]; {len(self.operators)} "
            f"buckets, {exchanging} of them with boundary rows "
            f"({self.bytes_per_hop / 2**20:.2f} MiB a hop over all ranks); "
            f"kernel {', '.join(kernels)}"
        )

    def laplacian(self, parameter_names: Sequence[str] | None = None) -> csr_array:
        """The global Laplacian, gathered on every rank: for study and tests of small models.

        Args:
            parameter_names: parameters whose rows to return, in this order; all by default.

        Returns:
            (n, n) float64: the rows and columns of these parameters' nodes, parameter after
            parameter. Collective on the communicator's group; equal on all ranks.

        Raises:
            ValueError: a name is not in the graph.
        """
        offset: dict[str, int] = {}
        first = 0
        for sharded in self._buckets:
            for parameter in sharded.bucket.parameters:
                offset[parameter.name] = first
                first += parameter.rows
        names = list(offset) if parameter_names is None else list(parameter_names)
        if parameter_names is None:
            names = [parameter.name for parameter in self.parameters]
        for name in names:
            if name not in offset:
                raise ValueError(
                    f"parameter {name!r} is not in the graph; it has: {', '.join(offset)}"
                )
        adjacency = self._gather_adjacency()
        degree = np.bincount(adjacency.row, adjacency.data, self.num_nodes).astype(np.float64)
        rows = np.arange(self.num_nodes)
        edges = Edges(
            adjacency.row.astype(np.int64), adjacency.col.astype(np.int64), adjacency.data
        )
        laplacian = laplacian_rows(edges, degree, rows, self.normalized).tocsr()
        rows_of = {parameter.name: parameter.rows for parameter in self.parameters}
        chosen = np.concatenate(
            [np.arange(offset[name], offset[name] + rows_of[name]) for name in names]
        )
        selection = csr_array(eye_array(self.num_nodes, format="csr")[chosen])
        return csr_array(selection @ laplacian @ selection.T)

    def _gather_adjacency(self) -> coo_array:
        """W of the whole graph; nodes are numbered bucket after bucket."""
        sources, targets, weights = [], [], []
        first = 0
        for sharded in self._buckets:
            edges = sharded.edges
            mine = np.isin(edges.source, sharded.primary_rows)
            sources.append(edges.source[mine] + first)
            targets.append(edges.target[mine] + first)
            weights.append(edges.weight[mine])
            first += sharded.bucket.nodes
        own = tuple(np.concatenate(parts) for parts in (sources, targets, weights))
        parts = self._communicator.gather_objects(own)
        source, target, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
        return coo_array((weight, (source, target)), shape=(self.num_nodes, self.num_nodes))
