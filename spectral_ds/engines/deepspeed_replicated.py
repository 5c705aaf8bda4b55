"""DeepSpeed stage 0: every rank holds the full gradient and the full weights.

In float32 the optimizer is torch's own. In bfloat16 DeepSpeed wraps it and keeps float32 weights:
`FP16_UnfusedOptimizer` one tensor a parameter, `FP16_Optimizer` one flat tensor a parameter group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.deepspeed import DeepSpeedEngine, PlacedFragment
from spectral_ds.engines.hooks import after_step_of
from spectral_ds.engines.newcomers import Admission, Known, label_of, reason_to_leave_out
from spectral_ds.engines.views import (
    flat_view,
    plain_gradient,
    reason_against_complex,
    reason_without_view,
    refuse,
    sparse_among,
)
from spectral_ds.sharding import Communicator


@dataclass(frozen=True, eq=False)
class ReplicatedFragment(PlacedFragment):
    """A whole parameter; `offset` counts in the flat tensor of its group, where there is one.

    Attributes:
        position: of the parameter in its group.
    """

    position: int


class DeepSpeedReplicatedEngine(DeepSpeedEngine[ReplicatedFragment]):
    """One fragment a parameter, the same on all ranks; every rank filters all of them alike."""

    takes_newcomers = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, engine.seq_data_parallel_group)  # which DeepSpeed averages over
        self.communicator = Communicator.alone(self.everyone.device)
        everything = (each.parameter for each in self._parameters())
        trained = {self._name_of[id(p)]: p for p in everything if p.requires_grad}
        refuse(trained, _reason_against)
        self._have_all()
        self._known = Known(placed.parameter for placed in self._placed)

    def _have_all(self) -> None:
        """Set `shapes` and `fragments` to what the optimizer trains, and what they had before.

        Without what cannot be filtered.
        """
        kept = {id(placed.parameter) for placed in self._placed}
        self._name_all(self._engine.module)
        placed = {id(each.parameter): each for each in self._parameters()}
        trained = {
            key
            for key, each in placed.items()
            if key in kept
            or (each.parameter.requires_grad and _reason_against(each.parameter) is None)
        }
        self.shapes = self._shapes_of(trained)
        self._own(placed[id(self.named[name])] for name in self.shapes)

    def _groups(self) -> Sequence[Sequence[torch.nn.Parameter]]:
        """The parameters of each of the optimizer's groups."""
        # Low precision optimizers put float32 copies into their groups and keep the parameters.
        kept: Sequence[Sequence[torch.nn.Parameter]] = getattr(self._optimizer, "fp16_groups", [])
        return kept or [group["params"] for group in self._optimizer.param_groups]

    def _parameters(self) -> Iterator[ReplicatedFragment]:
        """All parameters of the model that the optimizer has, in its order."""
        for group, parameters in enumerate(self._groups()):
            offset = 0
            for position, parameter in enumerate(parameters):
                if id(parameter) in self._name_of:
                    fragment = self._fragment(parameter, 0, parameter.numel())
                    yield ReplicatedFragment(fragment, parameter, group, offset, position)
                offset += parameter.numel()

    def newcomers(self) -> Sequence[torch.Tensor]:
        return self._known.others(self._groups())

    def admit(self, newcomers: Sequence[torch.Tensor]) -> Admission:
        self._known.add(newcomers)
        before, shapes = self._placed, self.shapes
        self._have_all()

        def undo() -> None:
            self.shapes = shapes
            self._own(before)

        module = self._engine.module
        labelled = {label_of(p, self._name_of, module): p for p in newcomers}
        kept = {id(placed.parameter) for placed in before}
        joined = [n for n in self.shapes if n in labelled and id(labelled[n]) not in kept]
        left_out = {
            label: _reason_against(parameter) or reason_to_leave_out(label in self.named)
            for label, parameter in labelled.items()
            if label not in self.shapes
        }
        return Admission(joined, left_out, undo)

    def gradients(self) -> list[torch.Tensor | None]:
        trained = {id(parameter) for group in self._groups() for parameter in group}
        gradients = [
            plain_gradient(placed.parameter) if id(placed.parameter) in trained else None
            for placed in self._placed
        ]
        return [None if gradient is None else flat_view(gradient) for gradient in gradients]

    def sparse_gradients(self) -> frozenset[str]:
        return sparse_among(
            {placed.fragment.parameter: placed.parameter for placed in self._placed}
        )

    def weights(self) -> list[torch.Tensor]:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups"):
            copies = optimizer.fp32_groups
            return [copies[p.group][p.position].detach().view(-1) for p in self._placed]
        if hasattr(optimizer, "fp32_groups_flat"):
            flat = optimizer.fp32_groups_flat
            return [placed.part_of(flat[placed.group].detach()) for placed in self._placed]
        return [placed.parameter.detach().view(-1) for placed in self._placed]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        if getattr(self._optimizer, "fused_adam_legacy", False):
            raise UnsupportedEngineError(
                "spectral_ds does not support acting on updates with optimizer.legacy_fusion, "
                "where the optimizer itself makes the low precision copies; set it to false"
            )
        return after_step_of(self._engine.basic_optimizer, after_update)


def _reason_against(parameter: torch.Tensor) -> str | None:
    """Why a parameter cannot be filtered; None: it can."""
    return reason_against_complex(parameter, "DeepSpeed") or reason_without_view(parameter)
