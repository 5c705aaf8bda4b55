"""What `spectral-ds inspect` has found, as it is shown, drawn and written."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from spectral_ds.cli.inspect.activity import ActivityReport
from spectral_ds.cli.inspect.candidates import CandidateResult, Recommendation
from spectral_ds.cli.inspect.graph_properties import GraphProperties


@dataclass(frozen=True)
class GraphReport:
    """One graph of the configuration.

    Attributes:
        name: its key in the configuration.
        node, laplacian: as configured.
        whole: what all of it is like.
        families: what the graph is like that each edge family makes alone.
        roles: what the nodes of each role are like.
        dimensions: what those of a tensor are, by role, where they are not (outputs, inputs).
    """

    name: str
    node: str
    laplacian: str
    whole: GraphProperties
    families: dict[str, GraphProperties]
    roles: dict[str, GraphProperties]
    dimensions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class InspectReport:
    """All that was found.

    Attributes:
        model: as the user named it.
        parameters, elements: trainable ones, and their elements.
        config: the whole configuration in use.
        graphs: those of edges that the configuration stacks.
        candidates: best first; None without data.
        recommendation: None without data.
        seconds: that it took.
        activity: of the inputs that were looked at: with data, and of graphs of activations.
        activity_words: one sentence on it; None without data.
    """

    model: str
    parameters: int
    elements: int
    config: dict[str, Any]
    graphs: list[GraphReport]
    candidates: list[CandidateResult] | None
    recommendation: Recommendation | None
    seconds: float
    activity: list[ActivityReport] = field(default_factory=list)
    activity_words: str | None = None

    def plain(self) -> dict[str, Any]:
        """Dicts, lists, strings and finite numbers; None stands for what is not a number."""
        found: dict[str, Any] = _finite(asdict(self))
        if self.recommendation is not None:
            found["recommendation"]["yaml"] = self.recommendation.yaml
        return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
