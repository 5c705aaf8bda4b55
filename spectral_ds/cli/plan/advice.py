"""What follows from a plan, in one or two sentences for people."""

from collections.abc import Mapping
from dataclasses import replace

from spectral_ds.cli.terminal import duration, size
from spectral_ds.config import SpectralConfig
from spectral_ds.planning.coactivation import PlannedCoactivation
from spectral_ds.planning.flows import FLOAT
from spectral_ds.planning.layouts import EngineName
from spectral_ds.planning.planner import Plan
from spectral_ds.stack.choices import feature_width, is_adaptive

# A rank that keeps more than this share of its shard for a graph is worth a word.
LARGE = 0.5
# What is sent is not worth a word below this share of the gradient.
LITTLE = 0.01


def advice(plan: Plan, others: Mapping[EngineName, Plan], step: float | None) -> str:
    """Two or three sentences: what to change so that less is sent, what it costs, what is missing.

    Args:
        others: plans of the same graphs under other engines.
        step: seconds of a step without the filter, if known.
    """
    sentences = [_of_sending(plan, others), _of_cost(plan, step), _of_samples(plan.config)]
    return " ".join(sentence for sentence in sentences if sentence)


def _of_sending(plan: Plan, others: Mapping[EngineName, Plan]) -> str:
    if plan.bytes_sent == 0:
        if plan.cluster.world_size == 1:
            return "One rank holds all neighbours."
        acts = any(graph.filter or graph.penalty for graph in plan.graphs)
        reason = "every edge joins what one rank owns" if acts else "no graph acts on a signal"
        if acts and all(isinstance(graph, PlannedCoactivation) for graph in plan.graphs):
            reason = "no shard boundary cuts a row"
        what = "Nothing but samples" if _needs_samples(plan.config) else "Nothing"
        return f"{what} is sent under {plan.engine}: {reason}."
    if plan.bytes_sent < LITTLE * FLOAT * float(plan.elements.sum()):
        return f"Next to nothing is sent under {plan.engine}: {_sent(plan)}."
    best = min(others.values(), key=lambda other: other.bytes_sent, default=plan)
    if best.bytes_sent < plan.bytes_sent / 2:
        return f"Under {best.engine} the same graph sends {_sent(best)}, not {_sent(plan)}."
    if _transposes_rows(plan):
        columns = plan.instead(config=_by_column(plan.config))
        return (
            "Similar rows lie on other ranks: whole shards are transposed and sent back, "
            f"{_sent(plan)}, whatever the response; similar columns (node: column) send "
            f"{_sent(columns)}."
        )
    return f"It sends {_sent(plan)}; no other engine sends half as little."


def _sent(plan: Plan) -> str:
    if plan.bytes_sent == 0:
        return "nothing"
    return f"{size(plan.bytes_sent / plan.cluster.world_size)} a rank and step"


def _transposes_rows(plan: Plan) -> bool:
    """Whether similarity of a parameter's own rows sends most of the gradient."""
    edges = [edge for graph in plan.config.stack for edge in graph.edges]
    return (
        all(graph.node == "row" for graph in plan.config.stack)
        and all(edge.family == "similarity" and edge.scope == "parameter" for edge in edges)
        and 2 * sum(graph.bytes_per_transpose for graph in plan.graphs)
        > FLOAT * plan.elements.sum()
    )


def _by_column(config: SpectralConfig) -> SpectralConfig:
    return replace(
        config,
        graph=replace(config.graph, node="column"),
        graphs=tuple(replace(graph, node="column") for graph in config.graphs),
    )


def _of_cost(plan: Plan, step: float | None) -> str:
    kinds = {**plan.device_memory, **plan.host_memory}
    largest = max(kinds, key=lambda kind: float(kinds[kind].max()))
    held = float(kinds[largest].max())
    memory = ""
    if held > LARGE * FLOAT * float(plan.elements.max()):
        memory = f"; most memory goes to {largest}, {size(held)}"
    worst = float(plan.seconds.max())
    if worst == 0:
        return f"It takes no time{memory}."
    if step is None:
        return f"It takes about {duration(worst)} of a step{memory}."
    share = f"{100 * worst / step:.2g} %"
    return f"It adds about {duration(worst)} to a step of {duration(step)} ({share}){memory}."


def _needs_samples(config: SpectralConfig) -> bool:
    """Whether the filter follows samples of the gradient."""
    return is_adaptive(config) or any(feature_width(g) is not None for g in config.stack)


def _of_samples(config: SpectralConfig) -> str:
    if not _needs_samples(config):
        return ""
    interval = config.statistics.interval
    often = "every step" if interval == 1 else f"every {interval} steps"
    return (
        f"The filter needs samples of the gradient, {often}: what they send is not counted, a "
        "sketch of each node and, a degree of its spectrum, the boundary rows of the sketches."
    )
