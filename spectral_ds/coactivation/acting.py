"""What acts on signals by co-activation graphs: a filter, and a regularizer's penalty.

Both are functions of the spectra of R, and of T where something is to be learned. What a graph
covers and has no inputs (embeddings, norms, biases) counts as of average activity: A = I.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.coactivation.cut_rows import Key
from spectral_ds.coactivation.operator import Factors, FactorsOf, Piece, SubspaceOperator
from spectral_ds.coactivation.spectrum import Spectrum, Values
from spectral_ds.coactivation.subspace import Response, SubspaceFunction
from spectral_ds.filters import Reference, Transfer
from spectral_ds.sharding import Signal


@dataclass(frozen=True)
class Held:
    """What one rank holds of the parameters that a graph covers.

    Attributes:
        operator: of those that have inputs.
        graph_of: by matrix of a parameter, the matrix of the site whose graph it has.
        others: numbers of the fragments of those that have none.
        device: where factors are kept.
        directions: of R, of the graphs that something acts on.
    """

    operator: SubspaceOperator
    graph_of: Mapping[Key, Key]
    others: Sequence[int]
    device: torch.device
    directions: dict[Key, torch.Tensor] = field(default_factory=dict)

    def graphs(self) -> list[Key]:
        """The graphs that some piece of this rank has."""
        found = (self.graph_of.get(piece.key) for piece in self.operator.pieces)
        return list(dict.fromkeys(key for key in found if key is not None))

    def directions_of(self, key: Key, spectrum: Spectrum) -> torch.Tensor:
        """U of a graph, (inputs, k); all that acts on it shares the memory."""
        if key not in self.directions:
            self.directions[key] = self.on_device(spectrum.vectors)
        return self.directions[key]

    def factors_of(self, factors: Mapping[Key, Factors]) -> FactorsOf:
        """By piece, from those by graph."""

        def of_piece(piece: Piece) -> Factors | None:
            graph = self.graph_of.get(piece.key)
            return None if graph is None else factors[graph]

        return of_piece

    def on_device(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """In float32."""
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)


class Function(NamedTuple):
    """G = c I + P M Pᵀ of one graph, on the device.

    Attributes:
        constant: c.
        basis: (inputs, k): P; to act on shards in float32.
        core: (k, k), float64: M.
    """

    constant: float
    basis: torch.Tensor
    core: torch.Tensor

    @classmethod
    def of(cls, function: SubspaceFunction, basis: torch.Tensor) -> "Function":
        """A function whose P is on the device."""
        core = torch.from_numpy(function.core).to(basis.device)
        return cls(function.constant, basis, core)

    def factors(self, constant: float, factor: float) -> Factors:
        """Those of constant · I + factor · G."""
        product = (factor * self.core).to(self.basis.dtype) @ self.basis.T
        return Factors(constant + factor * self.constant, self.basis, product)


class CoactivationFilter:
    """X ← (1 − s) X + s · X·G, and what has no inputs by 1 − s + s · rest.

    Args:
        held: what it acts on.
        functions: G of each graph that some piece here has.
        transfer: h.
        rest: factor on what has no inputs.
        is_ready: whether the graphs are known; before that, signals stay as they are.
    """

    def __init__(
        self,
        held: Held,
        functions: Mapping[Key, Function],
        transfer: Transfer,
        rest: float,
        is_ready: bool,
    ) -> None:
        self.transfer, self.is_ready = transfer, is_ready
        self._held, self._rest = held, rest
        self._functions = functions
        self._strength: float | None = None
        self._factors: dict[Key, Factors] = {}

    def is_identity(self, strength: float) -> bool:
        """Whether this strength leaves every signal as it is."""
        return strength == 0 or not self.is_ready or (self.transfer.is_identity and self._rest == 1)

    def apply(self, signal: Signal, strength: float) -> None:
        """Filter in place (collective if rows are cut).

        Args:
            signal: this rank's fragments, flat, any floating dtype; None stays as it is.
            strength: s, equal on all ranks.
        """
        if self.is_identity(strength):
            return
        if not self.transfer.is_identity:
            self._set(strength)
            self._held.operator.filter(signal, self._held.factors_of(self._factors))
        others = [signal[index] for index in self._held.others]
        found = [each for each in others if each is not None]
        if found and self._rest != 1:
            torch._foreach_mul_(found, 1 - strength + strength * self._rest)

    def move(self, weights: Signal, before: Signal, strength: float) -> bool:
        """See `StackedFilter.move`: θ ← θ_0 + (θ − θ_0)·G, in one pass over memory."""
        if self.is_identity(strength):
            return True
        if not self.transfer.is_identity:
            self._set(strength)
            factors_of = self._held.factors_of(self._factors)
            self._held.operator.contract(weights, before, factors_of)
        factor = 1 - strength + strength * self._rest
        for index in self._held.others if factor != 1 else ():
            weight, start = weights[index], before[index]
            if weight is not None and start is not None:
                torch.lerp(start, weight, factor, out=weight)
        return True

    def _set(self, strength: float) -> None:
        if strength == self._strength:
            return
        self._strength = strength
        for key, function in self._functions.items():
            self._factors[key] = function.factors(1 - strength, strength)


class CoactivationPenalty:
    """Δ (r(R) + ρI), Δ = θ − θ_ref.

    Args:
        held: what it acts on.
        spectra: R of each graph that some piece here has.
        response: r.
        transfer: the same, for people.
        ridge: ρ.
    """

    def __init__(
        self,
        held: Held,
        spectra: Mapping[Key, Spectrum],
        response: Response,
        transfer: Transfer,
        ridge: float,
    ) -> None:
        self.transfer = transfer
        self._held, self._ridge = held, ridge
        self._response = response
        self._spectra = {
            key: _Acting(
                held.directions_of(key, spectrum),
                held.on_device(response(spectrum.values)),
                self._at(spectrum.rest),
            )
            for key, spectrum in spectra.items()
        }
        self._of_others = self._at(1.0)
        # Of a step, by the number of its learning rate: memory that all steps use.
        self._of_step: dict[tuple[Key, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._factors = {
            key: Factors(
                each.rest + ridge, each.vectors, _thin(each.vectors, each.values, each.rest)
            )
            for key, each in self._spectra.items()
        }

    def add(
        self, reference: Reference, weights: Signal, target: Signal, factors: Sequence[float]
    ) -> None:
        """Target ← target + factor · Δ (r(R) + ρI), a factor a fragment (collective)."""
        before, held = reference.fragments, self._held
        held.operator.add(weights, before, target, held.factors_of(self._factors), factors)
        scale_of_others = self._of_others + self._ridge
        for index in held.others:
            weight, onto = weights[index], target[index]
            if weight is None or onto is None:
                continue
            start, scale = _reference_at(before, index), factors[index] * scale_of_others
            for some, moved in held.operator.moved(weight, start):
                onto[some].add_(moved.to(onto.device), alpha=scale)

    def pull(self, reference: Reference, weights: Signal, steps: Sequence[float]) -> None:
        """Δ ← Δ (I + step · (r(R) + ρI))⁻¹ in place: stable at any step (collective).

        Args:
            steps: learning rate · strength, of each fragment.
        """
        before, held = reference.fragments, self._held
        numbers = {step: number for number, step in enumerate(dict.fromkeys(steps))}
        made: dict[tuple[Key, float], Factors] = {}

        def factors_of(piece: Piece) -> Factors | None:
            graph, step = held.graph_of.get(piece.key), steps[piece.fragment]
            if graph is None:
                return None
            if (graph, step) not in made:
                acting = self._spectra[graph]
                rest = 1 / (1 + step * (acting.rest + self._ridge))
                product, values = self._memory(graph, numbers[step])
                torch.add(acting.values, self._ridge, out=values)
                values.mul_(step).add_(1).reciprocal_().sub_(rest)
                torch.mul(acting.vectors.T, values[:, None], out=product)
                made[graph, step] = Factors(rest, acting.vectors, product)
            return made[graph, step]

        held.operator.contract(weights, before, factors_of)
        for index in held.others:
            if (weight := weights[index]) is None:
                continue
            step = steps[index] * (self._of_others + self._ridge)
            start = _reference_at(before, index)
            if start is None:
                weight.mul_(1 / (1 + step))
            elif weight.dtype == start.dtype:
                weight.lerp_(start.to(weight.device, non_blocking=True), step / (1 + step))
            else:  # in float32, so that a weight at its reference stays there
                for some, moved in held.operator.moved(weight, start):
                    weight[some].sub_(moved.to(weight.device), alpha=step / (1 + step))

    def _memory(self, graph: Key, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For Q of a graph at one of the learning rates of a step, and its gains; made once."""
        if (graph, number) not in self._of_step:
            product = torch.empty_like(self._factors[graph].product)
            self._of_step[graph, number] = product, torch.empty_like(self._spectra[graph].values)
        return self._of_step[graph, number]

    def energy(self, reference: Reference, weights: Signal) -> torch.Tensor:
        """tr(Δ (r(R) + ρI) Δᵀ) of what this rank answers for, float64, 0-D (collective)."""
        before, held = reference.fragments, self._held
        total = torch.zeros((), dtype=torch.float64, device=held.device)
        found = held.operator.measure(weights, before, held.factors_of(self._factors))
        for key, energy in found.items():
            acting = self._spectra[held.graph_of[key]]
            total += (acting.values.double() - acting.rest) @ energy.directions
            total += (acting.rest + self._ridge) * energy.total
        for index in held.others:
            if (weight := weights[index]) is not None:
                for _, moved in held.operator.moved(weight, _reference_at(before, index)):
                    square = moved.square().sum(dtype=torch.float64)
                    total += (self._of_others + self._ridge) * square
        return total

    def _at(self, frequency: float) -> float:
        return float(self._response(np.array([frequency]))[0])


@dataclass(frozen=True)
class _Acting:
    """r on one graph: of its directions, (n, k), and of the rest."""

    vectors: torch.Tensor
    values: torch.Tensor
    rest: float


def _thin(vectors: torch.Tensor, values: torch.Tensor, rest: float) -> torch.Tensor:
    """Q = diag(values − rest) Uᵀ."""
    return ((values - rest) * vectors).T.contiguous()


def _reference_at(reference: Signal | None, index: int) -> torch.Tensor | None:
    return None if reference is None else reference[index]


def responses_within(transfer: Transfer, lambda_max: float) -> Response:
    """A transfer function of [0, λ_max] as a function of frequency."""

    def response(frequencies: Values) -> Values:
        found = transfer.at(2 * frequencies / lambda_max - 1)()
        return np.asarray(found.cpu().numpy(), np.float64)

    return response
