"""In memory: parameters of models, merged into one of them.

For `--refresh` and `--sweep`, which call the merged model. The result that is written is made of
the files, tensor by tensor, by the same arithmetic.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from spectral_ds.cli.merge.architecture import Architecture, Matrices
from spectral_ds.cli.merge.combine import combine
from spectral_ds.cli.merge.statistics import Functions


class InMemory:
    """Parameters that the base and all tuned models have; those that are merged must be there.

    Args:
        base: a model.
        tuned: the others.
        target: that takes merged parameters; may be the first of the tuned ones.

    Attributes:
        architecture: of the target.
        names: of the parameters, in the target's order.
    """

    def __init__(self, base: nn.Module, tuned: Sequence[nn.Module], target: nn.Module) -> None:
        self.architecture = Architecture(target)
        self._base = Architecture(base).parameters
        self._tuned = [Architecture(each).parameters for each in tuned]
        everywhere = [self._base, *self._tuned]
        self.names = [
            name
            for name in self.architecture.parameters
            if all(name in each for each in everywhere)
        ]

    @torch.no_grad()
    def write(self, names: Iterable[str], functions: Functions | None, rest: float) -> None:
        """Merge some parameters into the target.

        Args:
            functions: None: W₀ + rest · mean of ΔW, for all.
        """
        for name in names:
            tensors = [self._base[name], *(each[name] for each in self._tuned)]
            target = self.architecture.parameters[name].data
            base, *tuned = (each.data for each in tensors)
            site = self.architecture.sites.get(name)
            if functions is None or site is None:
                combine(base, tuned, None, rest, target)
                continue
            is_input_first = self.architecture.nodes[name].storage.is_input_first
            matrices = Matrices(name, 0, site.matrices, is_input_first)
            views = [matrices.of(each) for each in (base, target, *tuned)]
            for number in range(site.matrices):
                before, after, *others = (view[number] for view in views)
                combine(before, others, functions.of(name, number), rest, after)
