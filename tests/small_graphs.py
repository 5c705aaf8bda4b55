"""A graph of three small parameters on one process, and filters of it."""

import torch

from spectral_ds.filters import FixedTransfer, GraphFilter, SpectralFilter, StrengthSchedule
from spectral_ds.graph import Depth, ParameterNodes, Similarity
from spectral_ds.laplacian import ParameterGraph, Work, plan_operators
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches import WeightFeatures

CPU = torch.device("cpu")
ALONE = Communicator.alone(CPU)
SPARSE = (Similarity(4), Depth())
PATHS = (Depth(),)  # these are filtered by their exact eigenbasis


def small_graph(normalized=True, kernel="torch_csr", families=SPARSE):
    """The graph of three 9 × 5 parameters, and a plan of one operator."""
    parameters = [ParameterNodes(f"l.{block}.w", (9, 5)) for block in range(3)]
    layout = ShardLayout.gather([Fragment(p.name, 0, 45) for p in parameters], ALONE)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(45, generator=generator) for _ in parameters]
    graph = ParameterGraph.build(
        parameters,
        families,
        layout,
        {"weights": WeightFeatures(layout.own, weights, 0, ALONE)},
        ALONE,
        normalized=normalized,
        progress=lambda done: None,
    )
    plan = plan_operators(
        graph,
        layout,
        ALONE,
        ALONE,
        work=Work(hops=3, transposes=2),
        exchange="best",
        kernel=kernel,
        bucket_elements=10**6,
    )
    assert len(plan.operators) == 1
    return graph, plan


def transfer_on(graph, response, order, tolerance):
    return FixedTransfer(response, graph.lambda_max, graph.only_paths, order, tolerance, CPU)


def filter_of(graph, plan, transfer, **schedule):
    """The whole filter of one graph."""
    graph_filter = GraphFilter(plan.shipments, transfer)
    return SpectralFilter(lambda: [graph_filter], StrengthSchedule(**schedule))
