"""The plan: how each group of parameters is brought together, and the operators that do it.

Boundary: own rows stay, boundary rows come, once a hop. Transpose: all rows come, in slices of
columns, once a function of L. Both are equal in result; `best` takes the one that sends fewer
bytes, group of joined parameters by group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array

from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.buckets import SHIPMENT_ELEMENTS, Bucket, columns_at_once
from spectral_ds.geometry.owners import RowOwners
from spectral_ds.graph import Edges
from spectral_ds.laplacian.boundary import BoundaryExchange
from spectral_ds.laplacian.eigenbasis import Eigenbasis
from spectral_ds.laplacian.kernels import KERNELS, KernelName, choose_kernel
from spectral_ds.laplacian.operator import LaplacianOperator, chebyshev_block, laplacian_rows
from spectral_ds.laplacian.packing import (
    Exchange,
    ExchangeName,
    Packable,
    count_exchanges,
    exchange_of,
    nodes_in_scratch,
    packs_of,
    shipments_of,
)
from spectral_ds.laplacian.parameter_graph import Group, ParameterGraph
from spectral_ds.laplacian.scratch import allocate_scratch
from spectral_ds.laplacian.shipment import Shipment
from spectral_ds.laplacian.transpose import Transposition, column_slices
from spectral_ds.laplacian.work import Work
from spectral_ds.sharding import Communicator, ShardLayout, intervals


@dataclass
class OperatorPlan:
    """The operators of one graph on one shard layout, in an order equal on all ranks.

    Attributes:
        operators: one a bucket.
        shipments: the same operators; what is transposed together, for a signal that comes, is
            filtered and returns.
        exchanges: how many groups are exchanged in each way.
        work: what is to be done at a step.
        bytes_per_hop: that all ranks together send for a product with L, as boundary rows.
        bytes_per_transpose: that they send to bring the signal of transposed groups, or to return
            it.
        scratch_bytes: of this rank's scratch memory, which the operators share.
    """

    operators: list[LaplacianOperator] = field(default_factory=list)
    shipments: list[Shipment] = field(default_factory=list)
    exchanges: dict[Exchange, int] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    bytes_per_hop: int = 0
    bytes_per_transpose: int = 0
    scratch_bytes: int = 0

    @property
    def bytes_sent(self) -> int:
        """Bytes that all ranks together send at a step."""
        return self.bytes_of(self.work)

    def bytes_of(self, work: Work) -> int:
        """Bytes that all ranks together send for other work."""
        hops = 0 if work.hops is None else work.hops  # without a series, no group takes hops
        return hops * self.bytes_per_hop + work.transposes * self.bytes_per_transpose

    def describe(self) -> str:
        """One sentence for people."""
        kernels = sorted({op.kernel.name for op in self.operators if op.kernel is not None})
        ways = ", ".join(f"{count} {way}" for way, count in self.exchanges.items() if count)
        return (
            f"groups of joined parameters: {ways} ({self.bytes_sent / 2**20:.2f} MiB a step over "
            f"all ranks); {len(self.operators)} buckets; kernel {', '.join(kernels) or 'none'}"
        )


def plan_operators(
    graph: ParameterGraph,
    layout: ShardLayout,
    communicator: Communicator,
    everyone: Communicator,
    *,
    work: Work,
    exchange: ExchangeName,
    kernel: KernelName,
    bucket_elements: int,
    dtype: torch.dtype = torch.float32,
    exchange_dtype: torch.dtype | None = None,
) -> OperatorPlan:
    """Plan the operators, and allocate the scratch memory that they work in (collective).

    Args:
        layout: the fragments of all ranks.
        everyone: all ranks; more than the communicator's if parameters are replicated.
        work: what is to be done at a step.
        exchange: which way to bring neighbours together, where a group needs any.
        kernel: the multiply kernel of sparse blocks.
        bucket_elements: no rank stores more of one bucket, unless 16 columns are larger.
        dtype: of the signals.
        exchange_dtype: of what ranks send to each other; None: the same.
    """
    exchange_dtype = exchange_dtype or dtype
    groups, world_size = graph.groups, layout.world_size
    exchanges = _exchanges(groups, layout, communicator, work, exchange)
    plan = OperatorPlan(exchanges=count_exchanges(exchanges), work=work)
    maker = _Maker(graph, layout, communicator, everyone, kernel, dtype)
    packables = [
        Packable(group.bucket.width, group.owners.elements(world_size), group.is_path, way)
        for group, way in zip(groups, exchanges, strict=True)
    ]
    for pack in packs_of(packables, bucket_elements):
        members = [groups[position] for position in pack]
        plan.operators.extend(maker.operators(exchanges[pack[0]], members, bucket_elements))
    sizes = [op.transposition.largest if op.transposition else None for op in plan.operators]
    plan.shipments = [
        Shipment([plan.operators[position] for position in positions], communicator)
        for positions in shipments_of(sizes, SHIPMENT_ELEMENTS)
    ]
    own = [
        sum(op.exchange.buffers.elements_sent for op in plan.operators if op.exchange is not None),
        sum(op.transposition.buffers.elements_sent for op in plan.operators if op.transposition),
    ]
    sent = communicator.sum_(torch.tensor(own, device=communicator.device)).tolist()
    plan.bytes_per_hop, plan.bytes_per_transpose = (
        count * exchange_dtype.itemsize for count in sent
    )
    plan.scratch_bytes = allocate_scratch(
        plan.operators, plan.shipments, communicator.device, dtype, exchange_dtype
    )
    return plan


def plan_on_node_signals(
    graph: ParameterGraph,
    columns: Mapping[str, int],
    layout: ShardLayout,
    communicator: Communicator,
    everyone: Communicator,
    *,
    bucket_elements: int,
    kernel: KernelName = "torch_csr",
    dtype: torch.dtype = torch.float32,
) -> OperatorPlan:
    """Plan operators for signals of some columns a node, such as sketches (collective).

    Rows stay with the rank that answers for them and exchange their boundary.

    Args:
        columns, layout: see `ParameterGraph.of_node_signals`.
        others: see `plan_operators`.
    """
    return plan_operators(
        graph.of_node_signals(columns, layout),
        layout,
        communicator,
        everyone,
        work=Work(hops=1, transposes=2),
        exchange="boundary",
        kernel=kernel,
        bucket_elements=bucket_elements,
        dtype=dtype,
    )


def _exchanges(
    groups: Sequence[Group],
    layout: ShardLayout,
    communicator: Communicator,
    work: Work,
    wanted: ExchangeName,
) -> list[Exchange]:
    """How each group's rows come to their neighbours; one all-reduce."""
    counts = np.zeros((len(groups), 2), np.int64)
    for index, group in enumerate(groups):
        width = group.bucket.width
        rectangles = group.bucket.rectangles(layout.held)
        slices = column_slices(group.owners.elements(layout.world_size), width)
        mine = slices[layout.rank : layout.rank + 2]
        stays = (part.clipped(*mine) for part in rectangles)
        away = sum(part.numel for part in rectangles) - sum(p.numel for p in stays if p)
        needed = intervals.total(LocalBlock.of(width, rectangles, group.edges).needed)
        counts[index] = needed, away
    total = communicator.sum_(torch.from_numpy(counts).to(communicator.device)).tolist()
    return [exchange_of(needed, away, work, wanted) for needed, away in total]


@dataclass(frozen=True)
class _Maker:
    """Makes the operators of a pack: a few groups of equal width and exchange."""

    graph: ParameterGraph
    layout: ShardLayout
    communicator: Communicator
    everyone: Communicator
    kernel: KernelName
    dtype: torch.dtype

    def operators(
        self, exchange: Exchange, groups: Sequence[Group], bucket_elements: int
    ) -> list[LaplacianOperator]:
        """One for each slice of columns of the pack's bucket."""
        whole = Bucket.of([p for group in groups for p in group.bucket.parameters])
        edges = self._edges(exchange, groups)
        degree = np.concatenate([group.degree for group in groups])
        # Where every stored element is the signal's own: a dense product, unlike a sparse one,
        # would spread what happens to lie in scratch memory (0 · NaN).
        is_dense = groups[0].is_path and exchange != "boundary"
        kernel_name = "dense" if is_dense else None
        last: LaplacianOperator | None = None
        made = []
        for bucket in self._slices(whole, exchange, edges, bucket_elements, is_dense):
            operator = self._arranged(bucket, exchange, edges)
            block, device = operator.block, self.communicator.device
            if kernel_name is None:
                matrix = self._matrix(block, edges, degree)
                kernel_name = choose_kernel(self.kernel, matrix, block.width, self.everyone)
            if last is not None and block.has_rows_of(last.block):
                operator.kernel, operator.eigenbasis = last.kernel, last.eigenbasis
            elif block.own > 0:
                matrix = self._matrix(block, edges, degree)
                operator.kernel = KERNELS[kernel_name](matrix, device, self.dtype)
                if is_dense:
                    operator.eigenbasis = Eigenbasis.of(matrix.toarray(), device)
            if block.own > 0:
                last = operator
            made.append(operator)
        return made

    def _matrix(
        self, block: LocalBlock, edges: Edges, degree: npt.NDArray[np.float64]
    ) -> csr_array:
        """The block's part of L̃."""
        own = edges.from_sources(block.own_rows)
        rows = laplacian_rows(own, degree, block.own_rows, self.graph.normalized)
        return chebyshev_block(rows, block, self.graph.lambda_max)

    def _edges(self, exchange: Exchange, groups: Sequence[Group]) -> Edges:
        """At least the edges from the rows that this rank will store, numbered over the pack."""
        parts = []
        first = 0
        for group in groups:
            edges = group.edges
            if exchange == "transpose" and not group.is_path:
                shares = self.communicator.gather_objects(group.primary_edges(self.layout.rank))
                edges = Edges.concatenate(shares).combined(np.add)
            parts.append(edges.shifted(first))
            first += group.bucket.nodes
        return Edges.concatenate(parts)

    def _slices(
        self,
        whole: Bucket,
        exchange: Exchange,
        edges: Edges,
        bucket_elements: int,
        is_dense: bool,
    ) -> list[Bucket]:
        """Slices of columns, equal on all ranks; or each rank its own, of paths that stay."""
        rectangles = whole.rectangles(self.layout.held)
        if is_dense and exchange == "local":
            if not rectangles:
                return []
            low = min(part.column for part in rectangles) // 16 * 16
            high = max(part.column + part.columns for part in rectangles)
            own = replace(whole, low=low, high=high)
            return own.slices(columns_at_once(bucket_elements, whole.nodes))
        if exchange == "boundary":
            block = LocalBlock.of(whole.width, rectangles, edges)
            rows, others = np.array([block.own, len(block.boundary_rows)], np.float64)
            most = int(self.communicator.maximum(float(nodes_in_scratch(rows, others))))
        else:
            most = int(whole.touched(self.layout).max())
        return whole.slices(columns_at_once(bucket_elements, most))

    def _arranged(self, bucket: Bucket, exchange: Exchange, edges: Edges) -> LaplacianOperator:
        """Where the bucket's elements lie and how they come there; no kernel yet."""
        if exchange == "transpose":
            owners = RowOwners.of(bucket, self.layout)
            slices = column_slices(owners.elements(self.layout.world_size), bucket.width)
            rectangles = bucket.rectangles_of_ranks(self.layout)
            transposition = Transposition.plan(bucket.nodes, rectangles, slices, self.communicator)
            return LaplacianOperator(bucket, transposition.block, transposition=transposition)
        own = bucket.rectangles(self.layout.held)
        block = LocalBlock.of(bucket.width, own, edges)
        boundary = None
        if exchange == "boundary":
            owners = RowOwners.of(bucket, self.layout)
            boundary = BoundaryExchange.plan(block, owners, self.communicator)
        return LaplacianOperator(bucket, block, exchange=boundary)
