"""Choosing: from a configuration to the nodes, the edge families and the sketches of its graphs.

In: settings and plain values: names, shapes, the width of an attention head. Out: what the stack
and the planner make graphs of. Knows no engine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spectral_ds.config import ADAPTIVE, GraphConfig, SpectralConfig, SpectralConfigError
from spectral_ds.graph import (
    Depth,
    EdgeFamily,
    Pair,
    ParameterNodes,
    Ring,
    Similarity,
    UnknownHeadWidthError,
    match_parameters,
)

# Of adaptive responses, whose gains follow the powers of each band.
SKETCH_WIDTH = 64
# For the monitor alone: the spectrum of a signal of many nodes needs no more columns. Short signals
# are cheap as they are.
MONITOR_SKETCH_WIDTH, LONGEST_WHOLE = 16, 128


@dataclass(frozen=True)
class GraphChoice:
    """What one graph of a configuration is made of.

    Attributes:
        key: where it stands in the configuration: `graph`, or `graphs[0]` and so on.
        settings: what stands there.
        parameters: whose nodes it joins, in model order.
        families: by which rules.
    """

    key: str
    settings: GraphConfig
    parameters: tuple[ParameterNodes, ...]
    families: tuple[EdgeFamily, ...]


def choose_graphs(
    shapes: Mapping[str, tuple[int, ...]], config: SpectralConfig, head_width: int | None
) -> list[GraphChoice]:
    """What each graph of a configuration is made of, in the order in which they filter.

    Args:
        shapes: of the model's trainable parameters, in model order.
        head_width: rows of an attention head, where the configuration does not say; None: unknown.

    Raises:
        SpectralConfigError: a pattern that the user wrote matches no parameter, none is left, or
            family pair meets grouped queries and does not know their heads.
    """
    found = []
    for index, settings in enumerate(config.stack):
        key = f"graphs[{index}]" if config.graphs else "graph"
        parameters = choose_parameters(shapes, settings, key)
        families = edge_families(settings, head_width)
        try:
            for family in families:
                family.links(parameters)
        except UnknownHeadWidthError as error:
            raise SpectralConfigError(f"spectral_ds.{key}.edges: {error}") from error
        found.append(GraphChoice(key, settings, tuple(parameters), tuple(families)))
    return found


def is_adaptive(config: SpectralConfig) -> bool:
    """Whether gains follow estimates of signal and noise."""
    return bool({config.filter.response, config.regularizer.response} & set(ADAPTIVE))


def feature_width(graph: GraphConfig) -> int | None:
    """Width of the sketches that similarity of gradients compares; None without it."""
    widths = [edge.sketch_width for edge in graph.edges if edge.features == "gradient"]
    return widths[0] if widths else None


def sketch_shape(graph: GraphConfig, config: SpectralConfig) -> tuple[int, int] | None:
    """(width, longest signal that stays whole) of the sketches that are measured on a graph.

    None if nobody needs them. Where gradients are compared, they say which samples are finite.
    """
    if is_adaptive(config):
        return SKETCH_WIDTH, 0
    # An element's signal is one number: its sketch would be a second gradient.
    is_shown = config.monitor.enabled and graph.node != "element"
    if is_shown or feature_width(graph) is not None:
        return MONITOR_SKETCH_WIDTH, LONGEST_WHOLE
    return None


def choose_parameters(
    shapes: Mapping[str, tuple[int, ...]], config: GraphConfig, key: str
) -> list[ParameterNodes]:
    """The parameters that the patterns of a graph choose.

    Args:
        key: where the graph stands in the configuration.

    Raises:
        SpectralConfigError: a pattern that the user wrote matches no parameter, or none is left.
    """
    chosen, unmatched = match_parameters(shapes, config.include, config.exclude)
    defaults = GraphConfig()
    for name in ("include", "exclude"):
        for pattern in getattr(config, name):
            if pattern in unmatched and pattern not in getattr(defaults, name):
                raise SpectralConfigError(
                    f"spectral_ds.{key}.{name}: pattern {pattern!r} matches no trainable "
                    f"parameter; there are {len(shapes)}, for example {_some(shapes)}"
                )
    if not chosen:
        raise SpectralConfigError(
            f"spectral_ds.{key}: no parameter is left to filter; include {list(config.include)} "
            f"without exclude {list(config.exclude)} leaves none of {len(shapes)} trainable "
            f"parameters, for example {_some(shapes)}"
        )
    return [ParameterNodes(name, shapes[name], config.node) for name in chosen]


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:3]) or "none"


def edge_families(config: GraphConfig, head_width: int | None) -> list[EdgeFamily]:
    """The edge families of a graph.

    Args:
        head_width: rows of an attention head, where the configuration does not say; None: unknown.
    """
    families: list[EdgeFamily] = []
    for edge in config.edges:
        if edge.family == "depth":
            families.append(Depth(edge.weight))
        elif edge.family == "ring":
            families.append(Ring(edge.weight))
        elif edge.family == "pair":
            families.append(Pair(edge.head_width or head_width, edge.weight))
        else:
            families.append(
                Similarity(
                    edge.neighbours,
                    edge.scope,
                    edge.features,
                    edge.sketch_width,
                    edge.weight,
                )
            )
    return families


def head_width_of(holders: Iterable[object]) -> int | None:
    """Rows of an attention head, as the model's own config has it; None if it does not say.

    Args:
        holders: modules, and whatever else may hold some.
    """
    modules = (m for holder in holders for m in getattr(holder, "modules", list)())
    for module in modules:
        config: Any = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if heads:
            return int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return None
