"""Which graph, and which response on it, would keep a gradient's signal and drop its noise.

In: signal and noise by band of frequency on each candidate graph, measured on gradients that no
graph was made from. Out: the candidates ranked, and the configuration to use.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from spectral_ds.config import SECTION, EdgeConfig, GraphConfig, Node
from spectral_ds.filters import Heat
from spectral_ds.monitor import TOO_NOISY, verdict
from spectral_ds.monitor.verdict import BARELY, SEPARATES
from spectral_ds.spectrum import SignalToNoise, kept_over_total

Values = npt.NDArray[np.float64]

TAUS = (0.5, 1.0, 2.0, 4.0, 8.0)
# The share by which the best response must better a gradient's cosine with the true one.
WORTH_FILTERING = 0.01
# Wiener's gains need running statistics in training: the share they must gain over heat.
WORTH_STATISTICS = 0.02
# Keys of the section for graphs and responses that follow the gradient, as in preset `denoise`.
REFRESH_INTERVAL = 50
STATISTICS = {"interval": 1, "decay": 0.98}


@dataclass(frozen=True)
class Candidate:
    """A graph that might be worth filtering on."""

    name: str
    graph: GraphConfig


@dataclass(frozen=True)
class CandidateResult:
    """What was measured of a candidate: signal and noise of the gradient on its graph.

    Attributes:
        edges: of its graph.
        samples: gradients that were sampled.
        signal, noise: (bands,): power by equal bands of frequency, lowest first.
        signal_kept, noise_kept: shares in the lowest eighth of the frequencies.
        kept_over_total: signal-to-noise ratio there over that of all; a random basis gives 1.
        alignment: by response, the cosine to expect between a filtered gradient and the true one.
        words: one sentence.
    """

    name: str
    edges: int
    samples: int
    signal: list[float]
    noise: list[float]
    signal_kept: float | None
    noise_kept: float | None
    kept_over_total: float | None
    alignment: dict[str, float]
    words: str

    @property
    def judgement(self) -> str:
        """Whether the graph separates signal from noise, in a few words."""
        if self.kept_over_total is None:
            return self.words if self.samples == 0 else "too noisy to tell"
        if self.kept_over_total < BARELY:
            return "does not separate"
        return "separates" if self.kept_over_total >= SEPARATES else "barely separates"

    @property
    def unfiltered(self) -> float:
        """The alignment without a filter."""
        return self.alignment["identity"]

    @property
    def filtered(self) -> float:
        """The alignment by the best response."""
        return max(self.alignment.values())

    @property
    def is_worth_it(self) -> bool:
        """Whether the graph separates, in frequencies that hold enough to matter."""
        separates = self.kept_over_total is not None and self.kept_over_total >= BARELY
        return separates and self.filtered >= (1 + WORTH_FILTERING) * self.unfiltered


@dataclass(frozen=True)
class Recommendation:
    """What to do.

    Attributes:
        words: one sentence.
        config: the section to use.
    """

    words: str
    config: dict[str, Any]

    @property
    def yaml(self) -> str:
        """To paste."""
        return yaml.safe_dump(self.config, sort_keys=False, default_flow_style=None)


def candidates(stack: tuple[GraphConfig, ...]) -> list[Candidate]:
    """The usual graphs over the parameters of the configured one, and those that it adds.

    Graphs of activations are none of them: they are not there to tell signal from noise, which is
    what candidates are judged by. `activity` looks at them.
    """
    first = stack[0]
    neighbours = next((e.neighbours for e in first.edges if e.family == "similarity"), 8)
    weights = EdgeConfig(neighbours=neighbours)
    gradient = EdgeConfig(neighbours=neighbours, features="gradient")
    usual: dict[str, tuple[Node, EdgeConfig]] = {
        "weights similarity, rows": ("row", weights),
        "gradient similarity, rows": ("row", gradient),
        "gradient similarity, columns": ("column", gradient),
        "depth": ("row", EdgeConfig("depth")),
        "pair": ("row", EdgeConfig("pair")),
        "ring": ("row", EdgeConfig("ring")),
    }
    found = []
    for name, (node, edge) in usual.items():
        refresh = REFRESH_INTERVAL if edge.features == "gradient" else 0
        graph = GraphConfig(
            node, first.include, first.exclude, (edge,), "normalized", refresh_interval=refresh
        )
        found.append(Candidate(name, graph))
    known = {replace(candidate.graph, refresh_interval=0) for candidate in found}
    for index, graph in enumerate(stack):
        # An element's signal is one number: there is no noise to average.
        is_judged = graph.node != "element" and graph.edges[0].family != "activations"
        if is_judged and replace(graph, refresh_interval=0) not in known:
            name = "configured" if len(stack) == 1 else f"configured, graphs[{index}]"
            found.append(Candidate(name, graph))
    return found


def measured_result(
    name: str, edges: int, found: SignalToNoise, lambda_max: float
) -> CandidateResult:
    """The result of one candidate, for the lowest eighth of the frequencies."""
    signal, noise = found.signal, found.noise
    bands = len(signal)
    low = (np.arange(bands) < max(1, bands // 8)).astype(np.float64)
    alike = np.ones(bands)
    positive = np.maximum(signal, 0), np.maximum(noise, 0)
    words = verdict(signal, noise, alike, found.error)
    is_known = words != TOO_NOISY
    kept = [float(low @ power / power.sum()) if is_known else None for power in positive]
    return CandidateResult(
        name=name,
        edges=edges,
        samples=found.samples,
        signal=signal.tolist(),
        noise=noise.tolist(),
        signal_kept=kept[0],
        noise_kept=kept[1],
        kept_over_total=kept_over_total(signal, noise, low) if is_known else None,
        alignment=alignments(found, lambda_max) if is_known else {},
        words=words,
    )


def unmeasured_result(name: str, reason: str) -> CandidateResult:
    """The result of a candidate that has no edges on this model."""
    return CandidateResult(name, 0, 0, [], [], None, None, None, {}, reason)


def gains_of(found: SignalToNoise, lambda_max: float) -> dict[str, Values]:
    """Gains of each band by the responses that may be recommended."""
    signal, noise = np.maximum(found.signal, 0), np.maximum(found.noise, 0)
    total = signal + noise
    wiener = np.where(total > 0, signal / np.where(total > 0, total, 1), 1.0)
    heat = {f"heat {tau:g}": Heat(tau)(lambda_max * found.centers) for tau in TAUS}
    return {"identity": np.ones(len(signal)), **heat, "wiener": wiener}


def alignments(found: SignalToNoise, lambda_max: float) -> dict[str, float]:
    """The cosine to expect between h(L) g and E g: √((Σ h S)²/(Σ S · Σ h² (S + N))).

    It does not depend on the gain's scale, which an adaptive optimizer takes away.
    """
    signal, noise = np.maximum(found.signal, 0), np.maximum(found.noise, 0)
    cosines = {}
    for name, gains in gains_of(found, lambda_max).items():
        energy = float(np.square(gains) @ (signal + noise))
        cosines[name] = float(gains @ signal) / float(np.sqrt(signal.sum() * energy))
    return cosines


def ranked(results: list[CandidateResult]) -> list[CandidateResult]:
    """Sort by signal-to-noise ratio of the lowest frequencies over the total, the best first."""
    return sorted(results, key=lambda found: -(found.kept_over_total or 0.0))


def recommend(results: list[CandidateResult], graphs: Mapping[str, GraphConfig]) -> Recommendation:
    """The graph and the response to use.

    Args:
        results: ranked.
        graphs: of the candidates, by name.
    """
    known = [result for result in results if result.kept_over_total is not None]
    if not known:
        words = "the gradients are too noisy to tell signal from noise: give more --steps, or a "
        return Recommendation(f"{words}larger --batch-size", {SECTION: {"preset": "observe"}})
    worth = [result for result in known if result.is_worth_it]
    if not worth:
        return Recommendation(
            f"filter nothing here: even on the best graph, {known[0].name}, the lowest frequencies "
            f"have {_kept(known[0])}, and the best response brings a gradient's cosine with the "
            f"true one from {known[0].unfiltered:.3f} to {known[0].filtered:.3f}",
            {SECTION: {"preset": "observe"}},
        )
    best = worth[0]
    response = _response(best.alignment)
    return Recommendation(
        f"use {best.name} with response {_words(response)}: the graph {best.judgement} signal from "
        f"noise (its lowest frequencies have {_kept(best)}), and filtering is to bring a "
        f"gradient's cosine with the true one from {best.unfiltered:.3f} to "
        f"{best.alignment[response]:.3f}",
        {SECTION: section(graphs[best.name], response)},
    )


def _kept(result: CandidateResult) -> str:
    return f"{result.kept_over_total:.2f} times the total signal-to-noise ratio"


def _response(alignment: Mapping[str, float]) -> str:
    """Heat if it is about as good as Wiener's gains."""
    heat = max((name for name in alignment if name.startswith("heat")), key=alignment.__getitem__)
    is_better = alignment["wiener"] > (1 + WORTH_STATISTICS) * alignment[heat]
    return "wiener" if is_better else heat


def _words(response: str) -> str:
    name, _, tau = response.partition(" ")
    return f"{name} (tau {tau})" if tau else name


def section(graph: GraphConfig, response: str) -> dict[str, Any]:
    """The configuration's section for a graph and a response, without what is default."""
    edges = [{"family": edge.family, **_changed(edge, EdgeConfig())} for edge in graph.edges]
    settings = _changed(graph, GraphConfig())
    name, _, tau = response.partition(" ")
    found: dict[str, Any] = {
        "graph": {**settings, "edges": edges},
        "filter": {"response": name, **({"tau": float(tau)} if tau else {}), "strength": 1.0},
    }
    if graph.refresh_interval or not tau:
        found["statistics"] = dict(STATISTICS)
    return found


def _changed(config: GraphConfig | EdgeConfig, default: GraphConfig | EdgeConfig) -> dict[str, Any]:
    names = [field.name for field in fields(config) if field.name not in ("edges", "family")]
    changed = [name for name in names if getattr(config, name) != getattr(default, name)]
    values = asdict(config)
    return {n: list(v) if isinstance(v := values[n], tuple) else v for n in changed}
