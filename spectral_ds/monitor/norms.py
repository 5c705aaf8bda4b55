"""Norms of whole parameters, of blocks and of roles, though every rank holds only parts."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.graph import ParameterNodes, parameter_nodes
from spectral_ds.sharding import Communicator, Fragment, Signal, squared_norm_of

Values = npt.NDArray[np.float64]

# Of a parameter of more elements than this, `thinned` takes one in a stride.
LARGE = 2**18
# The first that has no divisor in common with the width, so that all columns are among them; no
# width has one with each.
STRIDES = (17, 19, 23, 29, 31, 37, 41, 43, 47)


class ParameterNorms:
    """Sums of squares by parameter, gathered by block and role.

    Args:
        shapes: full shape of every parameter by name, in model order.
        fragments: this rank's.
        communicator: the ranks that share the parameters.

    Attributes:
        blocks: block numbers that parameters have, ascending.
        roles: roles, in model order.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        fragments: Sequence[Fragment],
        communicator: Communicator,
    ) -> None:
        nodes = list(parameter_nodes(shapes).values())
        position = {node.name: index for index, node in enumerate(nodes)}
        owners = [position[fragment.parameter] for fragment in fragments]
        self._owners = torch.tensor(owners, dtype=torch.int64, device=communicator.device)
        strides = [_stride(node) for node in nodes]
        self._strides = [strides[position] for position in owners]
        # Counted in the whole parameter, so that every sharding takes the same.
        starts = zip(fragments, self._strides, strict=True)
        self._skipped = [-fragment.start % stride for fragment, stride in starts]
        pairs = zip(nodes, strides, strict=True)
        self._thinning = np.array([node.numel / -(-node.numel // stride) for node, stride in pairs])
        self._communicator = communicator
        self.names = [node.name for node in nodes]
        self.blocks = sorted({node.block for node in nodes if node.block is not None})
        self.roles = list(dict.fromkeys(node.role for node in nodes))
        of_block = {block: i for i, block in enumerate(self.blocks)}
        self._block = [-1 if node.block is None else of_block[node.block] for node in nodes]
        self._role = [self.roles.index(node.role) for node in nodes]

    def squares(self, *signals: Signal) -> Values:
        """‖x‖² of each parameter in each signal; (signals, parameters); one all-reduce."""
        device = self._communicator.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        total = torch.zeros(len(signals), len(self.names), dtype=torch.float64, device=device)
        for row, signal in zip(total, signals, strict=True):
            parts = [zero if part is None else squared_norm_of(part).to(device) for part in signal]
            if parts:
                row.index_add_(0, self._owners, torch.stack(parts))
        found: Values = self._communicator.sum_(total).cpu().numpy()
        return found

    def thinned(self, signal: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of a signal: of large parameters one element in a stride, of others all."""
        found = zip(signal, self._skipped, self._strides, strict=True)
        return [part[skipped::stride] for part, skipped, stride in found]

    def squares_of_thinned(self, signal: Signal) -> Values:
        """‖x‖² of each parameter, estimated from what `thinned` took; (parameters,); collective."""
        return np.asarray(self.squares(signal)[0] * self._thinning)

    def by_block(self, squares: Values) -> Values:
        """Sums of squares of each block's parameters; (blocks,)."""
        inside = np.array(self._block) >= 0
        block = np.array(self._block)[inside]
        return np.bincount(block, squares[inside], len(self.blocks)).astype(np.float64)

    def by_role(self, squares: Values) -> Values:
        """Sums of squares of each role's parameters; (roles,)."""
        return np.bincount(self._role, squares, len(self.roles)).astype(np.float64)

    def by_block_and_role(self, values: Values) -> Values:
        """A value a parameter as a table; (blocks, roles), NaN where there is no parameter."""
        table = np.full((len(self.blocks), len(self.roles)), np.nan)
        for block, role, value in zip(self._block, self._role, values, strict=True):
            if block >= 0:
                table[block, role] = np.nan_to_num(table[block, role]) + value
        return table

    def metrics(self, what: str, squares: Values, over: Values | None = None) -> dict[str, float]:
        """Norms in all, by block and by role; with `over`, their ratio to the norms of that."""
        found = {}
        for tag, gather in (("block", self.by_block), ("role", self.by_role)):
            labels = [f"{b:03d}" for b in self.blocks] if tag == "block" else self.roles
            values = _ratio(gather(squares), None if over is None else gather(over))
            for label, value in zip(labels, values, strict=True):
                found[f"{what}_by_{tag}/{label}"] = float(value)
        total = None if over is None else over.sum(keepdims=True)
        found[f"{what}/all"] = float(_ratio(squares.sum(keepdims=True), total)[0])
        return found


def _stride(node: ParameterNodes) -> int:
    if node.numel <= LARGE:
        return 1
    return next(stride for stride in STRIDES if node.width % stride)


def _ratio(squares: Values, over: Values | None) -> Values:
    if over is None:
        return np.sqrt(squares)
    return np.sqrt(np.where(over == 0, 0, squares) / np.where(over == 0, 1, over))
