"""SpectralPlugin: what happens at a step, in order, and how it is set up.

The only place that sees both engines and graphs. Reads the configuration and hands plain
arguments to everything below.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from tqdm import tqdm

from spectral_ds.config import GraphConfig, SpectralConfig
from spectral_ds.config_sources import SpectralConfigError
from spectral_ds.engines import Engine
from spectral_ds.filters import (
    ChebyshevSeries,
    Heat,
    Identity,
    Polynomial,
    Response,
    SpectralFilter,
    Tikhonov,
    Window,
)
from spectral_ds.graph import Depth, EdgeFamily, ParameterNodes, Similarity, match_parameters
from spectral_ds.laplacian import KernelName, KernelUnavailableError, ParameterGraph, require_kernel
from spectral_ds.laplacian.workspace import Workspace
from spectral_ds.monitor import Monitor
from spectral_ds.sharding import ShardLayout
from spectral_ds.spectrum import chebyshev_moments, squared_norm


def bucket_elements(device: torch.device) -> int:
    """How many elements to pack into a bucket, over all ranks.

    On CPUs a bucket should stay in the cache (measured on 53 M elements: 1.9 times faster);
    accelerators want fewer and larger launches.
    """
    return 2**20 if device.type == "cpu" else 2**26


class SpectralPlugin:
    """Filters the gradients of one engine before each of its optimizer steps.

    Made by `spectral_ds.initialize` or `spectral_ds.attach`, on every rank (collective).

    Attributes:
        config: the configuration in use.
        graph: the parameter graph.
        attached: False once detached.
    """

    def __init__(self, engine: Engine, config: SpectralConfig) -> None:
        self.config = config
        self.engine = engine
        communicator = engine.communicator
        models = engine.everyone.gather_objects(list(engine.shapes.items()))
        with engine.everyone.all_or_none():
            for rank, shapes in enumerate(models):
                if shapes != models[0]:
                    raise ValueError(_difference(rank, dict(shapes), dict(models[0])))
            parameters = _choose_parameters(engine.shapes, config.graph)
            try:
                require_kernel(_kernel(config))
            except KernelUnavailableError as error:
                raise SpectralConfigError(f"spectral_ds.{error}") from error
        layout = ShardLayout.gather(engine.fragments, communicator)
        layout.check({parameter.name: parameter.numel for parameter in parameters})
        self.graph = self._build_graph(parameters, layout)
        operators = [*self.graph.operators, *self.graph.sampled_operators]
        self._workspace = Workspace(operators, communicator.device)
        self.filter = self._build_filter()
        self.monitor = Monitor(
            self._squared_norm,
            self._moments,
            engine.write,
            self._warn,
            engine.everyone,
            interval=config.monitor.interval if config.monitor.enabled else 0,
            bands=config.monitor.bands,
        )
        self._filtered_step = -1
        self._skipped_steps = engine.skipped_steps
        self.attached = True
        engine.install(self.before_step)

    def before_step(self) -> None:
        """What the engine calls before its optimizer step, unless it has been done by hand."""
        if self._filtered_step != self.engine.step:
            self.filter_gradients()

    def filter_gradients(self) -> None:
        """One step: the gradients are averaged and not yet clipped.

        To be called by hand only where a training loop clips by itself: after the backward pass
        and before `clip_grad_norm_`. The hook then leaves this step alone.
        """
        self._warn_of_skipped_steps()
        step = self._filtered_step = self.engine.step
        gradients = self.engine.gradients()  # fragments of this rank, writable views
        self.monitor.before_filter(step, gradients)  # only on monitor steps
        self.filter.apply(gradients, step)  # h(L) X, boundary rows exchanged on the way
        self.engine.gradients_changed()  # norms that were taken too early
        self.monitor.after_filter(step, gradients, self._facts(step))

    def detach(self) -> None:
        """Restore everything that was wrapped; the engine then trains as without the plugin."""
        self.engine.remove()
        self.attached = False

    def metrics(self) -> dict[str, float]:
        """Metrics of the last monitored step, equal on all ranks; empty before the first.

        `step`; `gradient_norm/before` and `/after` of the filtered parameters;
        `band_energy_before/b` and `band_energy_after/b`, shares of energy in equal bands of
        frequency, lowest first; `filter_seconds` of the slowest rank; `boundary_bytes` that all
        ranks sent in the step; `strength`; `skipped_steps` so far; `nodes`; `edges`.
        """
        return dict(self.monitor.metrics)

    def describe(self) -> str:
        """What is attached, for people."""
        series = self.filter.series
        return (
            f"{self.graph.describe()}; filter {self.config.filter.response} of Chebyshev order "
            f"{series.order} (error <= {series.error:.1e}), strength "
            f"{self.config.filter.strength:g}; scratch {self._workspace.bytes / 2**20:.1f} MiB "
            "on this rank"
        )

    def _warn_of_skipped_steps(self) -> None:
        skipped = self.engine.skipped_steps
        if skipped > self._skipped_steps:
            self._warn(f"gradients were not finite; the engine has skipped {skipped} steps")
        self._skipped_steps = skipped

    def _warn(self, message: str) -> None:
        self.engine.log(f"spectral_ds: {message}", logging.WARNING)

    def _facts(self, step: int) -> Mapping[str, float]:
        return {
            "boundary_bytes": float(self.graph.bytes_per_hop * self.filter.hops_at(step)),
            "strength": self.filter.strength_at(step),
            "skipped_steps": float(self.engine.skipped_steps),
            "nodes": float(self.graph.num_nodes),
            "edges": float(self.graph.num_edges),
        }

    def _squared_norm(self, signal: Sequence[torch.Tensor | None]) -> torch.Tensor:
        return squared_norm(self.graph.operators, signal, self.engine.communicator)

    def _moments(self, signal: Sequence[torch.Tensor | None], count: int) -> torch.Tensor:
        return chebyshev_moments(
            self.graph.sampled_operators, self._workspace, signal, count, self.engine.communicator
        )

    def _build_graph(
        self, parameters: Sequence[ParameterNodes], layout: ShardLayout
    ) -> ParameterGraph:
        communicator, config = self.engine.communicator, self.config
        with tqdm(
            total=len(parameters),
            desc="spectral_ds: building the parameter graph",
            unit="parameter",
            disable=self.engine.everyone.rank > 0,
            mininterval=1,
        ) as bar:
            return ParameterGraph.build(
                parameters,
                _families(config.graph),
                layout,
                self.engine.weights(),
                communicator,
                self.engine.everyone,
                normalized=config.graph.laplacian == "normalized",
                kernel=_kernel(config),
                bucket_elements=bucket_elements(communicator.device),
                seed=config.seed,
                progress=bar.update,
            )

    def _build_filter(self) -> SpectralFilter:
        settings = self.config.filter
        try:
            series = ChebyshevSeries.fit(
                _response(self.config), self.graph.lambda_max, settings.order, settings.tolerance
            )
        except ValueError as error:
            raise SpectralConfigError(f"spectral_ds.{error}") from error
        return SpectralFilter(
            self.graph.operators,
            self._workspace,
            series,
            strength=settings.strength,
            warmup_steps=settings.warmup_steps,
            interval=settings.interval,
        )


def _choose_parameters(
    shapes: Mapping[str, tuple[int, ...]], config: GraphConfig
) -> list[ParameterNodes]:
    """The parameters that the patterns choose.

    Raises:
        SpectralConfigError: a pattern that the user wrote matches no parameter, or none is left.
    """
    chosen, unmatched = match_parameters(shapes, config.include, config.exclude)
    defaults = GraphConfig()
    for key in ("include", "exclude"):
        for pattern in getattr(config, key):
            if pattern in unmatched and pattern not in getattr(defaults, key):
                raise SpectralConfigError(
                    f"spectral_ds.graph.{key}: pattern {pattern!r} matches no trainable "
                    f"parameter; there are {len(shapes)}, for example {_some(shapes)}"
                )
    if not chosen:
        raise SpectralConfigError(
            f"spectral_ds.graph: no parameter is left to filter; include {list(config.include)} "
            f"without exclude {list(config.exclude)} leaves none of {len(shapes)} trainable "
            f"parameters, for example {_some(shapes)}"
        )
    return [ParameterNodes(name, shapes[name]) for name in chosen]


def _difference(
    rank: int, shapes: Mapping[str, tuple[int, ...]], first: Mapping[str, tuple[int, ...]]
) -> str:
    """How the trainable parameters of a rank differ from those of rank 0."""
    for name in (*first, *shapes):
        if first.get(name) != shapes.get(name):
            return (
                f"ranks train different models: parameter {name!r} has shape {first.get(name)} "
                f"on rank 0 and {shapes.get(name)} on rank {rank}"
            )
    return f"ranks train different models: parameters are in another order on rank {rank}"


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:3]) or "none"


def _families(config: GraphConfig) -> list[EdgeFamily]:
    return [
        Depth(edge.weight)
        if edge.family == "depth"
        else Similarity(
            edge.neighbours,
            cast(Literal["parameter", "role"], edge.scope),
            edge.sketch_width,
            edge.weight,
        )
        for edge in config.edges
    ]


def _response(config: SpectralConfig) -> Response:
    settings = config.filter
    responses: dict[str, Response] = {
        "identity": Identity(),
        "heat": Heat(settings.tau),
        "tikhonov": Tikhonov(settings.tau),
        "window": Window(settings.alpha),
        "polynomial": Polynomial(settings.coefficients),
    }
    return responses[settings.response]


def _kernel(config: SpectralConfig) -> KernelName:
    return cast(KernelName, config.operator.kernel)
