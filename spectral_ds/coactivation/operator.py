"""SubspaceOperator: Y = X·G on shards, X the (outputs × inputs) matrices of parameters.

G = c I + P M Pᵀ is thin: a row takes (X P) M Pᵀ, 4·k operations an element. A row that one rank
holds whole needs nothing of others. Of a row that a shard boundary cuts, the parts of X P add up, k
numbers each: they come to one of its ranks in one all-to-all, and return in another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from spectral_ds.coactivation.cut_rows import CutRows, Key
from spectral_ds.geometry.buckets import below_shard, bucket_elements
from spectral_ds.geometry.rectangles import Rectangle, rectangles_of
from spectral_ds.graph import ParameterNodes
from spectral_ds.sharding import Communicator, Fragment, ShardLayout, Signal


class Factors(NamedTuple):
    """G = cI + P Q of one matrix; Q = M Pᵀ. For an operator in float32, on the device.

    Attributes:
        constant: c.
        basis: (inputs, k): P.
        product: (k, inputs): Q.
    """

    constant: float
    basis: torch.Tensor
    product: torch.Tensor

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """X·G of whole rows, (rows, inputs), in the dtype of X (it allocates)."""
        filtered = (x @ self.basis.to(x.dtype)) @ self.product.to(x.dtype)
        return filtered.add_(x, alpha=self.constant)


@dataclass(frozen=True)
class Piece:
    """A part of a fragment that lies in one matrix.

    Attributes:
        fragment: which of a rank's fragments.
        key: of the matrix.
        rectangle: its inputs (nodes) and outputs (columns).
        low, high: its inputs, counted in the matrix.
        is_whole: whether these are all inputs of its outputs.
    """

    key: Key
    rectangle: Rectangle
    low: int
    high: int
    is_whole: bool

    @property
    def fragment(self) -> int:
        return self.rectangle.fragment

    @property
    def outputs(self) -> range:
        return range(self.rectangle.column, self.rectangle.column + self.rectangle.columns)

    def rows(self, fragment: torch.Tensor) -> torch.Tensor:
        """(outputs, inputs) as a view of the flat fragment."""
        return self.rectangle.view(fragment).T

    def rows_at_once(self, elements: int) -> int:
        """How many rows are filtered together; parts of cut ones all at once.

        Args:
            elements: what fits in the cache of a CPU, or takes few launches on an accelerator.
        """
        if not self.is_whole:
            return len(self.outputs)
        return min(len(self.outputs), max(1, elements // (self.high - self.low)))

    def elements_at_once(self, elements: int) -> int:
        """The elements of so many rows."""
        return self.rows_at_once(elements) * (self.high - self.low)


class Energy(NamedTuple):
    """The energy of the rows of one matrix, float64.

    Attributes:
        directions: (k,): along each column of P.
        total: ().
    """

    directions: torch.Tensor
    total: torch.Tensor


# Pieces, each with what acts on it.
Acting = list[tuple[Piece, Factors]]
# Gives G for a piece; None leaves the piece out, on all ranks alike.
FactorsOf = Callable[[Piece], Factors | None]
# Gives rows [first, last) of a piece, (rows, inputs) float32, which may be overwritten.
Read = Callable[[Piece, slice], torch.Tensor]
# Takes G of them.
Write = Callable[[Piece, slice, torch.Tensor], None]

# Of a fragment without rows, as many elements are taken together where the rows are short.
FEWEST = 2**16


class SubspaceOperator:
    """Evaluates functions on what one rank holds. Made on all ranks, without communication.

    Args:
        parameters: whose nodes are columns.
        layout: the fragments of all ranks.
        communicator: the ranks that share the parameters.
        columns: the most columns that any P has.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterNodes],
        layout: ShardLayout,
        communicator: Communicator,
        columns: int,
    ) -> None:
        device = self._device = communicator.device
        pieces = [list(pieces_of(parameters, fragments)) for fragments in layout.fragments]
        outputs = {p.name: p.width for p in parameters}
        self.pieces = pieces[layout.rank]
        held = [[(p.key, p.outputs) for p in each if not p.is_whole] for each in pieces]
        self._cut = CutRows(held, outputs, columns, communicator)
        elements = sum(parameter.numel for parameter in parameters)
        self._at_most = below_shard(bucket_elements(device), elements, layout.world_size)
        rows = [piece.rows_at_once(self._at_most) for piece in self.pieces if piece.is_whole]
        self._products = torch.empty(
            max(rows, default=1), columns, dtype=torch.float32, device=device
        )
        at_once = (piece.elements_at_once(self._at_most) for piece in self.pieces)
        self._largest = max(at_once, default=0)
        self._staging = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def bytes_sent(self) -> int:
        """By this rank, each time that a function is evaluated."""
        return self._cut.bytes_sent

    @property
    def scratch_bytes(self) -> int:
        """Of what it has allocated."""
        tensors = (self._cut.values, self._products, self._staging)
        return sum(each.numel() * each.element_size() for each in tensors)

    def filter(self, signal: Signal, factors_of: FactorsOf) -> None:
        """X ← X·G in place (collective if rows are cut).

        Args:
            signal: this rank's fragments, flat, any floating dtype; None stays as it is.
        """

        def write(piece: Piece, rows: slice, result: torch.Tensor) -> None:
            view = self._view(piece, rows, signal)
            if result.data_ptr() != view.data_ptr():
                view.copy_(result)

        self._run(signal, factors_of, lambda piece, rows: self._loaded(piece, rows, signal), write)

    def add(
        self,
        signal: Signal,
        reference: Signal | None,
        target: Signal,
        factors_of: FactorsOf,
        scales: Sequence[float],
    ) -> None:
        """Target ← target + scale · (X − X_ref)·G, a scale a fragment (collective if rows are cut).

        Args:
            reference: X_ref; None: 0.
        """

        def write(piece: Piece, rows: slice, result: torch.Tensor) -> None:
            view = self._view(piece, rows, target)
            view.add_(result.to(view.device), alpha=scales[piece.fragment])

        self._run(target, factors_of, self._difference(signal, reference), write)

    def contract(self, signal: Signal, reference: Signal | None, factors_of: FactorsOf) -> None:
        """X ← X_ref + (X − X_ref)·G in place (collective if rows are cut)."""

        def write(piece: Piece, rows: slice, result: torch.Tensor) -> None:
            view = self._view(piece, rows, signal)
            if reference is None:
                view.copy_(result)
                return
            start = self._view(piece, rows, reference)
            if start.device == view.device == result.device:
                torch.add(start, result, out=view)
            else:
                view.copy_(start).add_(result.to(view.device))

        self._run(signal, factors_of, self._difference(signal, reference), write)

    def moved(
        self, fragment: torch.Tensor, reference: torch.Tensor | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """X − X_ref of a fragment that no matrix has part in, some elements after others.

        Args:
            fragment: flat, any floating dtype, on any device.
            reference: as long; None: 0.

        Yields:
            which elements, and their difference, float32, on the device, until the next ones.
        """
        at_once = max(self._largest, min(self._at_most, FEWEST))
        for first in range(0, len(fragment), at_once):
            some = slice(first, first + at_once)
            start = None if reference is None else reference[some]
            yield some, self._moved(fragment[some], start)

    def measure(
        self, signal: Signal, reference: Signal | None, factors_of: FactorsOf
    ) -> dict[Key, Energy]:
        """The energy of X − X_ref by direction (collective if rows are cut; it allocates).

        Args:
            factors_of: gives what the directions are: the columns of the basis.

        Returns:
            By matrix, of what this rank answers for: over ranks, each element counts once.
        """
        read = self._difference(signal, reference)
        found: dict[Key, Energy] = {}

        def add(key: Key, x: torch.Tensor | None, products: torch.Tensor | None, k: int) -> None:
            if key not in found:
                zeros = torch.zeros(k + 1, dtype=torch.float64, device=self._device)
                found[key] = Energy(zeros[:k], zeros[k])
            if x is not None:
                found[key].total.add_(x.square().sum(dtype=torch.float64))
            if products is not None:
                found[key].directions.add_(products.square().sum(0, dtype=torch.float64))

        whole, parts = self._acting(signal, factors_of)
        self._sum_products(parts, read)
        for piece, factors in parts:
            add(piece.key, read(piece, ALL), None, factors.basis.shape[1])
        for key, products in self._cut.answered():
            if key in found:
                k = len(found[key].directions)
                add(key, None, products[:, :k], k)
        for piece, rows, factors in self._at_once(whole):
            x = read(piece, rows)
            add(piece.key, x, x @ factors.basis, factors.basis.shape[1])
        return found

    def _run(self, signal: Signal, factors_of: FactorsOf, read: Read, write: Write) -> None:
        """Evaluate G piece by piece."""
        whole, parts = self._acting(signal, factors_of)
        self._sum_products(parts, read)
        for piece, factors in parts:
            products = self._products_of(piece, factors)
            x = read(piece, ALL)
            x.addmm_(products, factors.product[:, piece.low : piece.high], beta=factors.constant)
            write(piece, ALL, x)
        for piece, rows, factors in self._at_once(whole):
            x = read(piece, rows)
            products = self._products[: len(x), : factors.basis.shape[1]]
            torch.mm(x, factors.basis, out=products)
            x.addmm_(products, factors.product, beta=factors.constant)
            write(piece, rows, x)

    def _acting(self, signal: Signal, factors_of: FactorsOf) -> tuple[Acting, Acting]:
        """Pieces that have a function: those of whole rows, and parts of cut ones."""
        found: tuple[Acting, Acting] = [], []
        for piece in self.pieces:
            factors = None if signal[piece.fragment] is None else factors_of(piece)
            if factors is not None:
                found[not piece.is_whole].append((piece, factors))
        return found

    def _sum_products(self, parts: Acting, read: Read) -> None:
        """X P of cut rows (collective if ranks share any)."""
        self._cut.clear()
        for piece, factors in parts:
            products = self._products_of(piece, factors)
            products.addmm_(read(piece, ALL), factors.basis[piece.low : piece.high])
        self._cut.sum_over_ranks()

    def _products_of(self, piece: Piece, factors: Factors) -> torch.Tensor:
        return self._cut.rows(piece.key, piece.outputs)[:, : factors.basis.shape[1]]

    def _at_once(self, whole: Acting) -> Iterator[tuple[Piece, slice, Factors]]:
        """Some rows after others."""
        for piece, factors in whole:
            end, rows = len(piece.outputs), piece.rows_at_once(self._at_most)
            for first in range(0, end, rows):
                yield piece, slice(first, min(first + rows, end)), factors

    def _view(self, piece: Piece, rows: slice, signal: Signal) -> torch.Tensor:
        fragment = signal[piece.fragment]
        assert fragment is not None, "acting"
        return piece.rows(fragment)[rows]

    def _loaded(self, piece: Piece, rows: slice, signal: Signal) -> torch.Tensor:
        """The rows in float32 on the device: themselves, or a copy."""
        view = self._view(piece, rows, signal)
        if view.dtype == torch.float32 and view.device == self._device:
            return view
        return self._stage(view.shape).copy_(view)

    def _difference(self, signal: Signal, reference: Signal | None) -> Read:
        def read(piece: Piece, rows: slice) -> torch.Tensor:
            start = None if reference is None else self._view(piece, rows, reference)
            return self._moved(self._view(piece, rows, signal), start)

        return read

    def _moved(self, view: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        moved = self._stage(view.shape)
        if start is None:
            return moved.copy_(view)
        is_plain = view.dtype == start.dtype == moved.dtype
        if is_plain and view.device == start.device == moved.device:
            return torch.sub(view, start, out=moved)
        return moved.copy_(view).sub_(start.to(self._device, non_blocking=True))

    def _stage(self, shape: torch.Size) -> torch.Tensor:
        """Memory of this shape, used again for the next rows."""
        if len(self._staging) < shape.numel():
            self._staging = torch.empty(
                max(self._largest, shape.numel()), dtype=torch.float32, device=self._device
            )
        return self._staging[: shape.numel()].view(shape)


ALL = slice(None)


def pieces_of(
    parameters: Sequence[ParameterNodes], fragments: Sequence[Fragment]
) -> Iterator[Piece]:
    """The parts of a rank's fragments, matrix by matrix, in order."""
    by_name = {parameter.name: parameter for parameter in parameters}
    for index, fragment in enumerate(fragments):
        parameter = by_name.get(fragment.parameter)
        if parameter is None:
            continue
        inputs = parameter.nodes_of_matrix
        for whole in rectangles_of(parameter, 0, fragment, index):
            for part in _by_matrix(whole, inputs):
                matrix, low = divmod(part.node, inputs)
                is_whole = part.nodes == inputs
                yield Piece((parameter.name, matrix), part, low, low + part.nodes, is_whole)


def _by_matrix(rectangle: Rectangle, inputs: int) -> Iterator[Rectangle]:
    """A rectangle cut between the matrices that lie one after another."""
    first, end = rectangle.node, rectangle.node + rectangle.nodes
    while first < end:
        last = min(end, (first // inputs + 1) * inputs)
        offset = rectangle.offset + (first - rectangle.node) * rectangle.node_step
        yield replace(rectangle, node=first, nodes=last - first, offset=offset)
        first = last
