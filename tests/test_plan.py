"""What a plan predicts from shapes is what ranks then send, and hold."""

import functools
from dataclasses import replace

import cells
import numpy as np
import pytest
import tiny
import torch
from brute_force import moved_by_brute_force, needed_by_brute_force, same_flow
from traffic import counting_bytes

import spectral_ds
from spectral_ds import planning
from spectral_ds.config import load_config
from spectral_ds.geometry.buckets import Bucket, bucket_elements, linked_parameters
from spectral_ds.graph import Depth, Edges, Pair, ParameterNodes, Ring, Similarity
from spectral_ds.laplacian import ParameterGraph, Work, plan_operators
from spectral_ds.planning.groups import plan_groups
from spectral_ds.sharding import Communicator, ShardLayout
from spectral_ds.sketches import WeightFeatures
from spectral_ds.stack import modules

ROWS = {"graph": {"edges": [{"family": "ring"}, {"family": "pair"}]}}
SECTIONS = {
    "depth": {"preset": "gradient_smoothing"},
    "depth, many hops": {"graph": {"edges": [{"family": "depth"}]}, "filter": {"tau": 5.0}},
    "ring and pair": ROWS,
    "ring and depth": {
        "graph": {"edges": [{"family": "ring"}, {"family": "depth"}], "laplacian": "combinatorial"}
    },
    "columns": {"graph": {**ROWS["graph"], "node": "column"}},
    "elements": {"graph": {**ROWS["graph"], "node": "element"}},
    "penalty": {**ROWS, "regularizer": {"strength": 1e-3, "coupling": "decoupled"}},
    "penalty over depth": {
        "graph": {"edges": [{"family": "depth"}]},
        "regularizer": {"strength": 1e-3},
    },
}
MONITORED = {"preset": "paper", "operator": {"kernel": "torch_csr"}}
# Exchanges, how many elements of a bucket a rank may hold (few make slices of columns), and the
# dtype of what travels.
USUAL = "best", bucket_elements(torch.device("cpu")), "float32"
PLANS = [
    USUAL,
    ("boundary", 700, "float32"),
    ("transpose", 700, "float32"),
    ("transpose", USUAL[1], "float32"),
    ("boundary", 700, "bfloat16"),
    ("transpose", 700, "bfloat16"),
]


def measured(engine_name):
    """By section what this rank holds and sends, by every plan."""
    training = cells.Training(engine_name, rates=(1e-3, 1e-3))
    is_deepspeed = training.cell.engine == "deepspeed"
    holder = training.engine if is_deepspeed else training.module
    optimizer = None if is_deepspeed else training.optimizer
    found = {}
    for label, section in SECTIONS.items():
        section = {**section, "monitor": {"enabled": False}, "operator": {"kernel": "torch_csr"}}
        plugin = spectral_ds.attach(holder, optimizer, section)
        found[label] = facts_of(plugin.stack.graphs[0], plugin.engine)
        with counting_bytes() as sent:
            training.step()
        found[label]["sent"] = sent
        plugin.detach()
    plugin = spectral_ds.attach(holder, optimizer, MONITORED)
    found["statistics"] = statistics_bytes(plugin.stack.graphs[0].samples.statistics)
    plugin.detach()
    found["fragments"] = [
        (f.parameter, f.start, f.length) for f in plugin.engine.fragments if f.length > 0
    ]
    training.close()
    return found


def statistics_bytes(statistics):
    """Of three sketches of the gradient, and of what measures their spectra."""
    sketches, plan = 3 * 4 * statistics.sketches.empty().numel(), statistics._spectrometer.plan
    kernels = sum(kernel_bytes(plan.operators).values())
    return sketches + kernels + plan.scratch_bytes


def facts_of(stage, engine):
    facts = {
        "graph": (stage.graph.num_nodes, stage.graph.num_edges, stage.graph.lambda_max),
        "step": stage.bytes_sent(1.0),
        "scratch": stage.plan.scratch_bytes,
        "edges": sum(24 * len(g.edges) + 8 * len(g.degree) for g in stage.graph.groups),
        "kernels": sum(kernel_bytes(stage.plan.operators).values()),
    }
    layout = ShardLayout.gather(engine.fragments, engine.communicator)
    for way, elements, dtype in PLANS:
        plan = stage.plan
        if (way, elements, dtype) != USUAL:
            plan = plan_operators(
                stage.graph,
                layout,
                engine.communicator,
                engine.everyone,
                work=stage.plan.work,
                exchange=way,
                kernel="torch_csr",
                bucket_elements=elements,
                exchange_dtype=getattr(torch, dtype),
            )
        facts[way, elements, dtype] = {
            "work": plan.work,
            "scratch": plan.scratch_bytes,
            "bytes": (plan.bytes_per_hop, plan.bytes_per_transpose, plan.bytes_sent),
            "groups by exchange": plan.exchanges,
            "exchanges": sum(op.exchange is not None for op in plan.operators),
            "transpositions": sum(op.transposition is not None for op in plan.operators),
        }
    return facts


def kernel_bytes(operators):
    """Of each kernel, by its id."""
    found = {}
    for operator in operators:
        if operator.kernel is None:
            continue
        matrix = operator.kernel.matrix
        if matrix.layout == torch.sparse_csr:
            parts = matrix.crow_indices(), matrix.col_indices(), matrix.values()
        else:  # and the function of it, of the same size
            parts = matrix, matrix, operator.eigenbasis.vectors
        found[id(operator.kernel)] = sum(p.numel() * p.element_size() for p in parts)
    return found


@functools.cache
def tiny_model():
    """The tiny model's shapes, and its optimizer's parameter groups."""
    model = tiny.TinyLlama()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    name_of = {id(p): name for name, p in trainable.items()}
    groups = [[name_of[id(p)] for p in g["params"]] for g in tiny.parameter_groups(model)]
    shapes = {name: tuple(p.shape) for name, p in trainable.items()}
    elements = sum(p.numel() for p in model.parameters())
    return planning.Model(
        "tiny", shapes, elements, modules.facts_of([model.llama], trainable)
    ), groups


@functools.cache
def planned(label, engine, world_size, way):
    """The plan of a section, or of the one that is monitored, by one of `PLANS`."""
    (model, groups), (exchange, elements, dtype) = tiny_model(), way
    is_monitored = label == "monitored"
    section = MONITORED if is_monitored else SECTIONS[label]
    config = load_config({**section, "monitor": {"enabled": is_monitored}})
    operator = replace(config.operator, exchange=exchange, exchange_dtype=dtype)
    config = replace(config, operator=operator)
    cluster = planning.Cluster(world_size, 2)
    return planning.plan_configuration(
        model, config, engine, cluster, planning.Machine(), elements, groups
    )


@pytest.fixture(
    scope="module",
    # ZeRO-1 cuts parameters as ZeRO-2 does.
    params=[(e, 4 if e == "zero2" else 2) for e in planning.ENGINES],
    ids=lambda cell: f"{cell[0]}-{cell[1]}-ranks",
)
def cell(request, ranks):
    """(engine, world size, facts of each rank)."""
    engine, world_size = request.param
    return engine, world_size, ranks(world_size).run(measured, engine)


def test_shards_are_the_engines_own(cell):
    engine, world_size, by_rank = cell
    model, groups = tiny_model()
    cuts = planning.cut_parameters(engine, model.shapes, world_size, groups)
    layout = planning.shard_layout(cuts, world_size)
    for facts, ours in zip(by_rank, layout.fragments, strict=True):
        assert sorted(facts["fragments"]) == sorted((f.parameter, f.start, f.length) for f in ours)


@pytest.mark.parametrize("label", SECTIONS)
def test_bytes_of_known_edges_are_exact(cell, label):
    engine, world_size, by_rank = cell
    for way in PLANS:
        plan = planned(label, engine, world_size, way)
        [graph] = plan.graphs
        expected, least, most = graph.edges
        assert (graph.all_nodes, expected, graph.lambda_max) == by_rank[0][label]["graph"]
        assert least == expected == most
        facts = by_rank[0][label][way]
        work = graph.work
        sent = work.hops * graph.bytes_per_hop + work.transposes * graph.bytes_per_transpose
        assert facts["bytes"] == (graph.bytes_per_hop, graph.bytes_per_transpose, sent)
        assert facts["work"] == work
        assert facts["groups by exchange"] == graph.exchanges_counted
        slices = dict.fromkeys(("local", "boundary", "transpose"), 0)
        for pack in graph.packs:
            slices[pack.exchange] += pack.slices
        assert facts["transpositions"] == slices["transpose"]
        # A slice of which no rank needs anything has no exchange.
        assert facts["exchanges"] <= slices["boundary"]
    plan = planned(label, engine, world_size, USUAL)
    sent = [facts[label]["sent"] for facts in by_rank]
    assert plan.bytes_sent == by_rank[0][label]["step"] == sum(map(sum, sent))
    assert len(sent[0]) == plan.cost.collectives


@pytest.mark.parametrize("label", SECTIONS)
def test_each_rank_holds_what_is_planned(cell, label):
    engine, world_size, by_rank = cell
    for way in PLANS:
        [graph] = planned(label, engine, world_size, way).graphs
        held = [facts[label][way]["scratch"] for facts in by_rank]
        # Slices of columns are taken to be alike on each rank.
        assert graph.memory["scratch"].max() == pytest.approx(max(held), rel=0.1)
    [graph] = planned(label, engine, world_size, USUAL).graphs
    for kind in ("scratch", "kernels"):
        assert graph.memory[kind].tolist() == [facts[label][kind] for facts in by_rank]
    edges = np.array([facts[label]["edges"] for facts in by_rank])
    runs = sum(len(group.parts.rank) for group in graph.groups)
    assert (edges <= graph.memory["edges"]).all()
    assert (graph.memory["edges"] <= edges + 24 * runs).all()  # owners are merged where they touch


def test_statistics_take_about_what_is_planned(cell):
    engine, world_size, by_rank = cell
    [graph] = planned("monitored", engine, world_size, USUAL).graphs
    held = [facts["statistics"] for facts in by_rank]
    np.testing.assert_allclose(graph.memory["statistics"], held, rtol=0.3)


LINEAR = {f"layers.{block}.linear.weight": (400, 64) for block in range(3)}


def similar(engine, scope):
    """What ranks send for similarity of random weights, and how many edges there are."""
    communicator = Communicator(None, torch.device("cpu"))
    world_size, rank = communicator.world_size, communicator.rank
    cuts = planning.cut_parameters(engine, LINEAR, world_size)
    layout = planning.shard_layout(cuts, world_size, rank)
    generator = torch.Generator().manual_seed(1)
    whole = {n: torch.randn(shape, generator=generator).view(-1) for n, shape in LINEAR.items()}
    weights = [whole[f.parameter][f.start : f.end] for f in layout.own]
    features = WeightFeatures(layout.own, weights, 0, communicator)
    found = {}
    for node in ("row", "column"):
        graph = ParameterGraph.build(
            [ParameterNodes(name, shape, node) for name, shape in LINEAR.items()],
            [Similarity(scope=scope)],
            layout,
            {"weights": features},
            communicator,
            normalized=True,
            progress=lambda done: None,
        )
        plan = plan_operators(
            graph,
            layout,
            communicator,
            communicator,
            work=Work(hops=4, transposes=2),
            exchange="boundary",
            kernel="torch_csr",
            bucket_elements=2**19,
        )
        found[node] = graph.num_edges, plan.bytes_per_hop
    return found


@pytest.mark.parametrize("scope", ["parameter", "role"])
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("world_size", [4])
def test_bytes_of_similar_rows_are_close(ranks, engine, scope, world_size):
    found = ranks(world_size).run(similar, engine, scope)[0]
    for node, (edges, sent) in found.items():
        plan = planned_linear(LINEAR, engine, world_size, scope=scope, node=node)
        [graph] = plan.graphs
        expected, least, most = graph.edges
        assert least <= edges <= most
        assert expected == pytest.approx(edges, rel=0.05)
        assert graph.bytes_per_hop == pytest.approx(sent, rel=0.05)


def planned_linear(shapes, engine, world_size, machines=1, node="row", others=(), **edge):
    graph = {"node": node, "edges": [{"family": "similarity", **edge}, *others]}
    config = load_config({"graph": graph, "operator": {"exchange": "boundary"}})
    return planning.plan_configuration(
        planning.Model("linear", shapes, 0),
        config,
        engine,
        planning.Cluster(world_size, machines),
        planning.Machine(),
        2**26,
    )


# Below, one process works out what every rank of many would own, store and send.

BLOCKS = 3
SHAPES = {
    f"model.layers.{block}.{name}": shape
    for block in range(BLOCKS)
    for name, shape in {
        "self_attn.q_proj.weight": (24, 10),
        "self_attn.k_proj.weight": (12, 10),
        "mlp.gate_proj.weight": (17, 10),
        "mlp.up_proj.weight": (17, 10),
        "norm.weight": (10,),
    }.items()
}
FAMILIES = {
    "depth": [Depth()],
    "ring": [Ring()],
    "pair": [Pair(head_width=3)],
    "all": [Depth(), Ring(), Pair(head_width=3)],
}


@pytest.mark.parametrize("world_size", [1, 6, 45])
@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2"])
def test_every_rank_sends_and_receives_what_is_planned(engine, world_size):
    cluster = planning.Cluster(world_size, max(1, world_size // 3))
    cuts = planning.cut_parameters(engine, SHAPES, world_size)
    layout = planning.shard_layout(cuts, world_size)
    for node in ("row", "column", "element"):
        # Grouped queries have no pairs of columns.
        parameters = [ParameterNodes(name, shape, node) for name, shape in SHAPES.items()]
        for families in FAMILIES.values():
            for group in plan_groups(parameters, families, cuts, cluster):
                members = group.parameters
                if group.is_path:
                    members = [replace(each, kind="parameter") for each in members]
                bucket = Bucket.of(members)
                needed = needed_by_brute_force(bucket, families, layout)
                same_flow(group.boundary.hop, needed, cluster)
                same_flow(group.transpose, moved_by_brute_force(bucket, layout), cluster)


@pytest.mark.parametrize("others", [[], [{"family": "ring"}]], ids=["alone", "and ring"])
@pytest.mark.parametrize("world_size", [8, 48])
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_similar_rows_are_as_near_as_by_chance(engine, world_size, others):
    """Pairs that are similar independently of each other, as the plan takes them to be."""
    shapes, nodes, neighbours = {"layers.0.a": (480, 7), "layers.1.a": (480, 7)}, 960, 8
    cuts = planning.cut_parameters(engine, shapes, world_size)
    layout = planning.shard_layout(cuts, world_size)
    bucket = Bucket.of([ParameterNodes(name, shape) for name, shape in shapes.items()])
    similarity = np.random.default_rng(0).random((nodes, nodes))
    similarity = np.maximum(similarity, similarity.T)
    np.fill_diagonal(similarity, -1)
    nearest = np.argsort(-similarity, axis=1)[:, :neighbours].reshape(-1)
    one_way = Edges(np.repeat(np.arange(nodes), neighbours), nearest, np.ones(len(nearest)))
    families = [Fixed(one_way), *(Ring() for _ in others)]
    pairs = needed_by_brute_force(bucket, families, layout)
    plan = planned_linear(shapes, engine, world_size, 2, others=others, scope="role")
    [graph] = plan.graphs
    both = Edges.concatenate([one_way, one_way.reversed()]).combined(np.maximum)
    ring = nodes * len(others)
    assert graph.edges[0] == pytest.approx(len(both) / 2 + ring, rel=0.02)
    [group] = graph.groups
    machine = np.arange(world_size) // (world_size // 2)
    near = pairs * (machine[:, None] == machine)
    hop = group.boundary.hop
    assert hop.sent.sum() == pytest.approx(pairs.sum(), rel=0.02)
    assert hop.received_near.sum() == pytest.approx(near.sum(), rel=0.05)
    np.testing.assert_allclose(hop.received, pairs.sum(axis=1), rtol=0.25)
    np.testing.assert_allclose(hop.sent, pairs.sum(axis=0), rtol=0.25)


class Fixed:
    """Edges that are given."""

    def __init__(self, given):
        self.given = given

    def edges(self, parameters, first_node, sources):
        return self.given


def test_linked_parameters_are_planned_together():
    parameters = [ParameterNodes(name, shape) for name, shape in SHAPES.items()]
    cluster = planning.Cluster(4, 1)
    cuts = planning.cut_parameters("zero3", SHAPES, 4)
    for families in FAMILIES.values():
        groups = plan_groups(parameters, families, cuts, cluster)
        assert [g.parameters for g in groups] == linked_parameters(parameters, families)
