"""A plan as plain numbers: what `spectral-ds plan --json` prints.

By rank there is the mean and the worst rank. Bytes are those that a rank sends.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from spectral_ds.cli.plan.advice import advice
from spectral_ds.planning.coactivation import PlannedCoactivation
from spectral_ds.planning.flows import FLOAT, Floats, Flow
from spectral_ds.planning.graphs import PlannedGraph
from spectral_ds.planning.layouts import EngineName
from spectral_ds.planning.planner import Plan

# The forward and backward pass of one token takes so many operations a parameter.
FLOPS_PER_PARAMETER = 6


def plan_report(
    plan: Plan, others: Mapping[EngineName, Plan], tokens: int | None, flops: float
) -> dict[str, Any]:
    """All of a plan, as `--json` prints it.

    Args:
        others: plans of the same graphs under other engines.
        tokens: of a rank in one step; None if not known.
        flops: that a rank does in a second.
    """
    step = None
    if tokens is not None:
        step = FLOPS_PER_PARAMETER * plan.model.elements * tokens / flops
    worst = float(plan.seconds.max())
    return {
        "model": plan.model.name,
        "parameters": plan.model.elements,
        "engine": plan.engine,
        "world_size": plan.cluster.world_size,
        "nodes": plan.cluster.machines,
        "graphs": [
            _coactivation(graph) if isinstance(graph, PlannedCoactivation) else _graph(graph)
            for graph in plan.graphs
        ],
        "bytes_per_step": plan.bytes_sent,
        "collectives_per_step": plan.cost.collectives,
        "not_counted": "measuring spectra, signal and noise",
        "per_rank": _per_rank(plan),
        "step": None
        if step is None
        else {"tokens": tokens, "flops": flops, "seconds": step, "added": worst / step},
        "other_engines": {
            name: {
                "bytes_per_step": other.bytes_sent,
                "seconds": float(other.seconds.max()),
            }
            for name, other in others.items()
        },
        "assumed": {
            **asdict(plan.machine),
            "bucket_elements": plan.bucket_elements,
            "kernel": "torch_csr",
        },
        "advice": advice(plan, others, step),
    }


def _coactivation(graph: PlannedCoactivation) -> dict[str, Any]:
    """A graph of activations; it has no hops and no λ_max that shapes tell."""
    expected, most = graph.graphs
    edge = graph.edge
    return {
        "family": "activations",
        "nodes": graph.all_nodes,
        # By names, query, key and value share their inputs.
        "graphs": {"expected": expected, "most": most},
        "directions": edge.rank,
        "keep": edge.keep,
        "learn": edge.learn,
        "bytes_per_evaluation": graph.bytes_per_evaluation,
        "groups": _inputs_groups(graph),
    }


def _inputs_groups(graph: PlannedCoactivation) -> list[dict[str, Any]]:
    """Matrices of equal roles that share their inputs, together."""
    count: dict[Any, int] = defaultdict(int)
    sent: dict[Any, int] = defaultdict(int)
    for group in graph.groups:
        key = tuple(dict.fromkeys(parameter.role for parameter in group))
        count[key] += group[0].matrices
        rows = sum(graph.cut.sent[parameter.name] for parameter in group)
        sent[key] += FLOAT * graph.columns * rows * graph.evaluations
    return [
        {"roles": list(roles), "meets": "cut rows" if sent[roles] else "local", "count": number,
         "bytes_per_step": sent[roles]}
        for roles, number in count.items()
    ]  # fmt: skip


def _graph(graph: PlannedGraph) -> dict[str, Any]:
    expected, least, most = map(round, graph.edges)
    penalty = graph.transfers.penalty
    return {
        "nodes": graph.all_nodes,
        "edges": {"expected": expected, "least": least, "most": most},
        "lambda_max": graph.lambda_max,
        # null of a filter by exact eigenbasis alone, and without a regularizer.
        "hops": {
            "filter": graph.transfers.filter.hops,
            "regularizer": None if penalty is None else penalty.hops,
        },
        "meetings": graph.exchanges_counted,
        "bytes_per_hop": graph.bytes_per_hop,
        "bytes_per_move": graph.bytes_per_transpose,
        "groups": _groups(graph),
    }


def _groups(graph: PlannedGraph) -> list[dict[str, Any]]:
    """Groups of equal roles and exchange, together."""
    count: dict[Any, int] = defaultdict(int)
    sent: dict[Any, int] = defaultdict(int)
    for group, exchange in zip(graph.groups, graph.exchanges, strict=True):
        key = group.roles, exchange
        count[key] += 1
        if exchange == "boundary":
            sent[key] += graph.exchange_bytes * (graph.work.hops or 0) * group.boundary.hop.total
        elif exchange == "transpose":
            sent[key] += graph.exchange_bytes * graph.work.transposes * group.transpose.total
    return [
        {"roles": list(roles), "meets": exchange, "count": number,
         "bytes_per_step": sent[roles, exchange]}
        for (roles, exchange), number in count.items()
    ]  # fmt: skip


def _per_rank(plan: Plan) -> dict[str, Any]:
    none = Flow.none(plan.cluster)
    hop = sum((graph.hop for graph in plan.graphs), none)
    transpose = sum((graph.transpose for graph in plan.graphs), none)
    computing = plan.cost.computing(plan.machine)
    communicating = plan.cost.communicating(plan.machine)
    return {
        "elements": _figures(plan.elements),
        "nodes": _figures(sum((s.nodes for s in plan.graphs), np.zeros_like(plan.elements))),
        "edges": _figures(sum((s.edges_held for s in plan.graphs), np.zeros_like(plan.elements))),
        "device_bytes": _memory(plan.device_memory),
        "host_bytes": _memory(plan.host_memory),
        # Of the device too, but before training.
        "calibration_bytes": plan.calibration,
        "boundary_bytes_per_hop": _bytes(hop),
        "transposed_bytes_per_move": _bytes(transpose),
        "bytes_per_step": _bytes(plan.cost.flow),
        "flops_per_step": _figures(plan.cost.flops),
        "traffic_bytes_per_step": _figures(plan.cost.traffic),
        "seconds": {
            "computing": _figures(computing, digits=6),
            "communicating": _figures(communicating, digits=6),
            "total": _figures(plan.seconds, digits=6),
        },
    }


def _memory(by_kind: Mapping[str, Floats]) -> dict[str, Any]:
    total = np.sum(list(by_kind.values()), axis=0)
    return {
        **{kind.replace(" ", "_"): _figures(each) for kind, each in by_kind.items()},
        "total": _figures(total),
    }


def _bytes(flow: Flow) -> dict[str, Any]:
    return {
        "within_node": _figures(flow.sent_near),
        "across_nodes": _figures(flow.sent - flow.sent_near),
        "total": _figures(flow.sent),
    }


def _figures(by_rank: Floats, digits: int | None = None) -> dict[str, float]:
    """Mean and worst rank; whole numbers unless digits are asked for."""
    return {
        "mean": round(float(by_rank.mean()), digits),
        "worst": round(float(by_rank.max()), digits),
    }
