"""Study: what a user asks of an attached plugin besides training: state, figures, spectra."""

import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.checkpoint import Persistence
from spectral_ds.config import SpectralConfig
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.monitor import Monitor
from spectral_ds.spectrum import Density, Eigenpairs, SignalToNoise
from spectral_ds.stack import CoactivationGraph, Stack


class Study:
    """The half of `SpectralPlugin` that takes no part in a step.

    Attributes:
        config: the configuration in use.
        stack: the graphs that filter one after another, and what acts by them.
        monitor: what is measured and shown.
    """

    config: SpectralConfig
    stack: Stack
    monitor: Monitor
    _persistence: Persistence

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Tell the task loss of a micro-batch, for the metric `joint_loss`.

        It does not communicate: any rank may call it alone, any number of times. A monitored step
        averages what all ranks observed since the last. DeepSpeed engines observe by themselves in
        `backward`, so do not observe the same loss again; in other loops call it yourself.
        """
        self.monitor.observe_loss(loss)

    def calibrate(self, batches: Sequence[Any]) -> None:
        """Family activations: keep what the model knows of these inputs (collective).

        Args:
            batches: each the keyword arguments of the model, a tuple of arguments, or its one
                argument; equal on all ranks, which share them out.

        Raises:
            ValueError: no graph is of family activations, or there is no batch.
        """
        self.stack.calibrate(batches)

    def save_activations(self, file: str | os.PathLike[str]) -> None:
        """Write what `keep` knows, a small safetensors file: `keep` may name it in other runs.

        Raises:
            OSError: rank 0 cannot write it; on all ranks.
            ValueError: no graph is of family activations, or nothing is known yet.
        """
        self.stack.save_activations(Path(file))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the plugin's state into a folder that all ranks see (collective).

        DeepSpeed's `save_checkpoint` does so by itself.

        Raises:
            OSError: a rank could not write; on all ranks. What was there before is still valid.
        """
        self._persistence.save(Path(folder))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on from a folder that `save` or a DeepSpeed checkpoint (`<tag>/spectral_ds`) wrote.

        At any world size, by any engine, at any ZeRO stage (collective). With torch engines and
        ZeRO 0, a state of parameters that are still frozen is loaded at the next step, which
        trains them.

        Raises:
            CheckpointError: the folder is missing, cut, altered or of another model or graph; on
                all ranks; or the next step does not train what it is of. With
                `checkpoint.strict: false` the plugin says so and makes a new graph.
        """
        self._persistence.load(Path(folder))

    def state_dict(self) -> dict[str, Any]:
        """The plugin's state, for `torch.distributed.checkpoint` with FSDP2, DDP and plain modules.

        Tensors of fixed shapes: whole on every rank, or DTensors laid out like their parameters.
        Collective; DeepSpeed's checkpoints carry the state by themselves.

        Raises:
            UnsupportedEngineError: the engine is DeepSpeed's.
        """
        return self._persistence.tensors()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` that `torch.distributed.checkpoint.load` has filled.

        Raises:
            CheckpointError: a part that the configuration needs is missing or altered, or it is of
                another model or graph; on all ranks. See `load` for `checkpoint.strict: false`.
            UnsupportedEngineError: the engine is DeepSpeed's.
        """
        self._persistence.use_tensors(state_dict)

    @property
    def graph(self) -> ParameterGraph | CoactivationGraph:
        """The parameter graph; of several, the first."""
        return self.stack.graphs[0].graph

    def metrics(self) -> dict[str, float]:
        """Metrics of the last monitored step, equal on all ranks: see `Monitor.metrics`."""
        return dict(self.monitor.metrics)

    def band_energies(self) -> dict[str, npt.NDArray[np.float64]]:
        """Shares of energy in bands of frequency at the last monitored step.

        The bands are equal ones of [0, λ_max]. On a graph of family activations, the last is the
        most active direction of each layer, those before it are the next ones in growing numbers,
        and the first is all others.

        Returns:
            "before" and "after" the filter: (bands,), float64, lowest first; empty before the
            first monitored step.
        """
        measured = {"before": self.monitor.before, "after": self.monitor.after}
        return {when: each.shares.copy() for when, each in measured.items() if each is not None}

    def describe(self) -> str:
        """What is attached, for people."""
        filtered, term = self.config.filter, self.config.regularizer
        graphs = "; then ".join(graph.describe() for graph in self.stack.graphs)
        described = f"{graphs}; strength {filtered.strength:g} on {filtered.apply_to}s"
        if term.strength > 0:
            described += f"; {term.coupling} regularizer of strength {term.strength:g}"
        return described

    def eigenpairs(self, k: int, graph: int = 0) -> list[Eigenpairs]:
        """The k lowest eigenpairs of every group of joined parameters (collective).

        On a graph of family activations: the k most active directions of each layer, on rank 0.

        Args:
            graph: which of several stacked graphs.

        Raises:
            NotConvergedError: the solver did not reach its residual; on all ranks.
            ValueError: k is not an integer >= 1, or there is no such graph.
        """
        _require_count("k", k)
        return self.stack.graph(graph).eigenpairs(k)

    def density(self, bins: int, graph: int = 0) -> Density:
        """Share of the graph's eigenvalues in each of equal bins of [0, λ_max] (collective).

        Args:
            graph: which of several stacked graphs.

        Raises:
            ValueError: bins is not an integer >= 1, or there is no such graph.
        """
        _require_count("bins", bins)
        return self.stack.graph(graph).density(bins)

    def snr(self, graph: int = 0) -> SignalToNoise:
        """Signal, noise and their ratio per band of frequency, from the samples so far.

        Raises:
            RuntimeError: nothing is sampled: the monitor is off and nothing else needs it, or the
                graph is of family activations.
            ValueError: there is no such graph.
        """
        return self.stack.graph(graph).signal_to_noise()


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} = {value!r}: must be an integer >= 1")
