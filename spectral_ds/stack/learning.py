"""Learning: the graphs of what a model is trained with, from its first micro-batches."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from spectral_ds.coactivation import Coactivation, Observer, Projections, Site, summed
from spectral_ds.config import EdgeConfig
from spectral_ds.engines import Engine


class Learning:
    """Watches what enters a model's layers in training, until it has seen enough.

    Args:
        engine: that trains the model.
        model: that is called, the engine's or in it.
        sites: to watch.
        edge: how much is enough.
        projections: of the sketches.
        leaders: who shares its inputs with whom; None: to be found.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        sites: Sequence[Site],
        edge: EdgeConfig,
        projections: Projections,
        leaders: Mapping[str, str] | None,
    ) -> None:
        self._engine, self._sites, self._edge = engine, sites, edge
        self._projections = projections
        self._observer = Observer(model, sites, projections, engine.everyone.device, leaders)
        self._observer.only_training = True
        self._observer.start()
        self._step = -1
        self._has_said = self._has_warned = False
        self._seen = 0.0

    def at_step(self, step: int) -> Coactivation | None:
        """The graphs, once there is enough; collective, once a step, where all ranks are there."""
        if step == self._step or not self._engine.is_complete:
            return None
        self._step = step
        everyone, edge = self._engine.everyone, self._edge
        before, self._seen = self._seen, float(everyone.sum_(self._tokens()).item())
        if self._seen < self._enough:
            self._warn_if_blind(self._seen)
            self._say_how_long(step, self._seen - before)
            return None
        self.stop()
        return summed(self._observer, self._sites, self._projections, edge.rank, everyone)

    def stop(self) -> None:
        """Take back the hooks."""
        self._observer.stop()

    def warn_of_end(self) -> None:
        """Warn that training has ended too early (no communication)."""
        if self._step >= 0:
            self._engine.log(
                f"learn = training: the filter has not acted, as {self._seen:,.0f} tokens were "
                f"seen of the {self._enough:,} that it waits for (samples x length)",
                logging.WARNING,
            )

    @property
    def _enough(self) -> int:
        return self._edge.samples * self._edge.length

    def _tokens(self) -> torch.Tensor:
        """The most vectors that this rank has seen enter one site; (1,)."""
        seen = [moments.count.max() for moments in self._observer.moments.values()]
        most = (
            torch.stack(seen).max() if seen else torch.zeros((), dtype=torch.float64, device="cpu")
        )
        return most.to(self._engine.everyone.device).reshape(1)

    def _warn_if_blind(self, tokens: float) -> None:
        if tokens == 0 and not self._has_warned:
            self._has_warned = True
            self._engine.log(
                "learn = training: no input of a layer was seen in the first step, and the filter "
                "waits for them; a compiled model hides them, and calls without gradients in "
                "evaluation do not count (model.train()): else name a file of texts instead",
                logging.WARNING,
            )

    def _say_how_long(self, step: int, tokens: float) -> None:
        if tokens > 0 and not self._has_said:
            self._has_said = True
            steps = math.ceil((self._enough - self._seen) / tokens)
            self._engine.log(
                f"learn = training: filtered from about step {step + steps} on, when "
                f"{self._enough:,} tokens are seen (samples x length)"
            )
