"""Choosing: from a configuration to the nodes, the edge families and the sketches of its graphs.

In: settings and plain values: names, shapes, the width of an attention head. Out: what the stack
and the planner make graphs of. Knows no engine.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from spectral_ds.config import ADAPTIVE, GraphConfig, SpectralConfig, SpectralConfigError
from spectral_ds.graph import (
    Depth,
    EdgeFamily,
    Pair,
    ParameterNodes,
    Ring,
    Similarity,
    Storage,
    UnknownHeadWidthError,
    match_parameters,
    parameter_nodes,
)
from spectral_ds.stack.modules import ModelFacts

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
        left_out: parameters that patterns choose and their modules leave out.
    """

    key: str
    settings: GraphConfig
    parameters: tuple[ParameterNodes, ...]
    families: tuple[EdgeFamily, ...]
    left_out: tuple[str, ...] = ()

    @property
    def is_coactivation(self) -> bool:
        """Whether it is made of activations, and not of edges."""
        return self.settings.edges[0].family == "activations"

    @property
    def by_module(self) -> list[str]:
        """What nodes there are because of modules, and not of names and shapes; often nothing."""
        stored = [f"{p.name}: {p.storage}" for p in self.parameters if p.storage != Storage()]
        return [*(f"without {name}" for name in self.left_out), *stored]


def choose_graphs(
    shapes: Mapping[str, tuple[int, ...]], config: SpectralConfig, facts: ModelFacts
) -> list[GraphChoice]:
    """What each graph of a configuration is made of, in the order in which they filter.

    Args:
        shapes: of the model's trainable parameters, in model order.
        facts: what else is known of the model.

    Raises:
        SpectralConfigError: a pattern that the user wrote matches no parameter, none is left, one
            has sparse gradients, or family pair meets grouped queries and does not know their
            heads.
    """
    found = []
    for index, settings in enumerate(config.stack):
        key = f"graphs[{index}]" if config.graphs else "graph"
        parameters, left_out = choose_parameters(shapes, settings, key, facts)
        families = edge_families(settings, facts.head_width)
        try:
            for family in families:
                family.links(parameters)
        except UnknownHeadWidthError as error:
            raise SpectralConfigError(f"spectral_ds.{key}.edges: {error}") from error
        found.append(
            GraphChoice(key, settings, tuple(parameters), tuple(families), tuple(left_out))
        )
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
    shapes: Mapping[str, tuple[int, ...]], config: GraphConfig, key: str, facts: ModelFacts
) -> tuple[list[ParameterNodes], list[str]]:
    """The parameters that a graph covers: what its patterns choose, by default without embeddings.

    While the default pattern of embeddings stands in `exclude`, these are also left out by the type
    of their module, whatever their names; and heads, while all others stand there.

    Args:
        key: where the graph stands in the configuration.
        facts: what is known of the model besides its shapes.

    Returns:
        The nodes of these parameters, and the names of those left out by type.

    Raises:
        SpectralConfigError: a pattern that the user wrote matches no parameter, none is left, or
            one has sparse gradients.
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
    left_out = [name for name in chosen if _is_left_out(name, config.exclude, facts)]
    dropped = set(left_out)
    chosen = [name for name in chosen if name not in dropped]
    by_type = " and embeddings and heads (exclude: [] takes them in)" if left_out else ""
    if not chosen:
        raise SpectralConfigError(
            f"spectral_ds.{key}: no parameter is left to filter; include {list(config.include)} "
            f"without exclude {list(config.exclude)}{by_type} leaves none of {len(shapes)} "
            f"trainable parameters, for example {_some(shapes)}"
        )
    refuse_sparse(chosen, facts.sparse, key)
    nodes = parameter_nodes(shapes, config.node, facts.storage)
    return [nodes[name] for name in chosen], left_out


def _is_left_out(name: str, exclude: Sequence[str], facts: ModelFacts) -> bool:
    """Whether a parameter is left out because of its module."""
    of_embeddings, *of_heads = GraphConfig().exclude
    is_embedding = of_embeddings in exclude and name in facts.embeddings
    return is_embedding or (set(of_heads) <= set(exclude) and name in facts.heads)


def refuse_sparse(chosen: Iterable[str], sparse: Collection[str], key: str) -> None:
    """Refuse to filter a parameter whose gradient is sparse.

    Raises:
        SpectralConfigError: there is one.
    """
    for name in chosen:
        if name in sparse:
            raise SpectralConfigError(
                f"spectral_ds.{key}: the gradient of parameter {name!r} is sparse, and a filter "
                "would make it dense; exclude the parameter, or make its module with sparse=False"
            )


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
        elif edge.family == "similarity":
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
