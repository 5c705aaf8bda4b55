"""Matrices that do not lie as (outputs, inputs) in their parameter: Conv1D, stacked experts."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from brute_force import moved_by_brute_force, needed_by_brute_force, same_flow
from on_paper import on_paper
from plain_step import RATE, assert_close, one_step
from torch import nn

import spectral_ds
from spectral_ds import planning
from spectral_ds.geometry.buckets import Bucket
from spectral_ds.graph import Depth, ParameterNodes, Ring, Similarity, Storage, parameter_nodes
from spectral_ds.planning.groups import plan_groups
from spectral_ds.planning.parts import joined
from spectral_ds.sharding import by_parameter
from spectral_ds.stack import facts_of

EDGES = [{"family": "similarity", "neighbours": 2}]
FILTER = {"response": "heat", "tau": 2.0, "strength": 0.8, "tolerance": 1e-7}
QUIET = {"monitor": {"enabled": False}}


# Matrices that lie otherwise


def usual(arrays, storage):
    """By (name, number): each matrix of (outputs, inputs)."""
    found = {}
    for name, array in arrays.items():
        stored = storage.get(name, Storage())
        matrices = array if stored.is_stacked else [array]
        for number, matrix in enumerate(matrices):
            found[f"{name}|{number}"] = matrix.T if stored.is_input_first else matrix
    return found


def expected_of(before, gradients, storage, edges, node="row"):
    """The oracle on each matrix as a parameter of its own; one σ² for a stack."""
    arrays, signals = usual(before, storage), usual(gradients, storage)
    laplacian = oracle.laplacian_of(adjacency_by_stack(arrays, edges, node))
    filtered = oracle.apply_function(laplacian, oracle.response_of(FILTER), signals, node)
    found = {}
    for name, array in before.items():
        stored = storage.get(name, Storage())
        count = len(array) if stored.is_stacked else 1
        matrices = [filtered[f"{name}|{number}"] for number in range(count)]
        matrices = [matrix.T if stored.is_input_first else matrix for matrix in matrices]
        found[name] = np.stack(matrices) if stored.is_stacked else matrices[0]
    return found


def adjacency_by_stack(arrays, edges, node):
    """W of the oracle; of similarity, whose σ² is that of all matrices of a parameter, its own."""
    total = 0
    first, count = oracle.numbering(arrays, node)
    for edge in edges:
        if edge["family"] != "similarity":
            total = total + oracle.adjacency_of(arrays, [edge], kind=node)
            continue
        matrix = np.zeros((count, count))
        for parameter in dict.fromkeys(name.partition("|")[0] for name in arrays):
            pairs = []
            for name in arrays:
                if name.partition("|")[0] != parameter:
                    continue
                rows = oracle.as_nodes(arrays[name], node)
                norm = np.linalg.norm(rows, axis=1)
                for i in range(len(rows)):
                    others = [j for j in range(len(rows)) if j != i and norm[i] * norm[j] > 0]
                    cosine = {j: rows[i] @ rows[j] / (norm[i] * norm[j]) for j in others}
                    others.sort(key=lambda j, cosine=cosine: -cosine[j])
                    start = first[name]
                    pairs += [
                        (start + i, start + j, 2 - 2 * cosine[j])
                        for j in others[: edge["neighbours"]]
                    ]
            variance = np.mean([d for _, _, d in pairs]) if pairs else 1.0
            for i, j, d in pairs:
                matrix[i, j] = matrix[j, i] = np.exp(-d / (2 * variance))
        total = total + matrix
    return total


def language_loss(model):
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    return model(input_ids=tokens, labels=tokens).loss


MAKE = {
    "GPT-2": tiny.gpt2,
    "Mixtral": lambda: tiny.experts("Mixtral"),
    "GPT-OSS": lambda: tiny.experts("GptOss"),
}
# Of names that end like this.
STACKED, STACKED_INPUT_FIRST = Storage(is_stacked=True), Storage(True, is_input_first=True)
STORAGE = {
    "GPT-2": dict.fromkeys(
        ("c_attn.weight", "c_fc.weight", "c_proj.weight"), Storage(is_input_first=True)
    ),
    "Mixtral": dict.fromkeys(("experts.gate_up_proj", "experts.down_proj"), STACKED),
    "GPT-OSS": {
        **dict.fromkeys(("experts.gate_up_proj", "experts.down_proj"), STACKED_INPUT_FIRST),
        **dict.fromkeys(("experts.gate_up_proj_bias", "experts.down_proj_bias"), STACKED),
    },
}
GRAPHS = {
    "similar rows": ("row", EDGES),
    "similar columns": ("column", EDGES),
    "ring of rows": ("row", [{"family": "ring"}]),
}


@pytest.mark.parametrize("model", MAKE)
@pytest.mark.parametrize("graph", GRAPHS)
def test_rows_are_outputs_of_each_matrix_wherever_they_lie(model, graph):
    node, edges = GRAPHS[graph]
    made = MAKE[model]()
    named = dict(made.named_parameters())
    storage = {
        name: stored
        for ending, stored in STORAGE[model].items()
        for name in named
        if name.endswith(ending)
    }
    assert facts_of([made], named).storage == storage
    graph = {"node": node, "edges": edges}
    section = {"graph": graph, "filter": FILTER, **QUIET}
    before, gradients, moved, plugin = one_step(made, section)
    names = {parameter.name for parameter in plugin.graph.parameters}
    before = {n: v for n, v in before.items() if n in names}
    gradients = {n: v for n, v in gradients.items() if n in names}
    assert_close(moved, expected_of(before, gradients, storage, edges, node))


@pytest.mark.parametrize("model", ["Mixtral", "GPT-OSS"])
def test_experts_that_do_not_say_how_they_lie_are_known_by_their_shapes(model):
    """As in transformers before 5, and Llama 4 in all."""
    made = MAKE[model]()
    named = dict(made.named_parameters())
    said = facts_of([made], named).storage
    modules = [m for m in made.modules() if hasattr(m, "is_transposed")]
    for module in modules:
        del module.is_transposed
    assert modules
    assert facts_of([made], named).storage == said


@pytest.mark.parametrize("model", ["Mixtral", "GPT-OSS"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_an_expert_that_got_no_token_does_not_move(model, graph):
    node, edges = GRAPHS[graph]
    section = {"graph": {"node": node, "edges": edges}, "filter": FILTER, **QUIET}
    made = MAKE[model]()
    _, gradients, moved, _ = one_step(made, section, language_loss)
    idle = busy = 0
    for name in gradients:
        if "experts" in name:
            for gradient, change in zip(gradients[name], moved[name], strict=True):
                idle += not gradient.any()
                busy += bool(change.any())
                assert change.any() == gradient.any(), name
    assert idle > 0
    assert busy > 0


def test_only_modules_of_experts_are_stacks():
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 2), "experts": nn.Conv1d(3, 4, 2)})
    model["own"] = nn.Bilinear(2, 3, 4)
    assert not facts_of([model], dict(model.named_parameters())).storage
    shapes, facts = on_paper(transformers.GPT2LMHeadModel, n_layer=1)
    assert {n for n, s in facts.storage.items() if s == Storage(is_input_first=True)} == {
        name for name in shapes if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    }


class SomeExpertsDoNothing(nn.Module):
    """As in LongCat-Flash, where some of those that can be chosen have no second matrix."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(5, 6, 4))
        self.down_proj = nn.Parameter(torch.zeros(3, 4, 3))


def test_stacks_of_one_module_may_differ_in_number():
    model = SomeExpertsDoNothing()
    storage = facts_of([model], dict(model.named_parameters())).storage
    assert storage == {"gate_up_proj": STACKED, "down_proj": STACKED}


def sharded(model, engine):
    """What a step of one engine changes, by name; every rank has the same batch."""
    import deepspeed

    made = MAKE[model]()
    section = {"graph": {"edges": EDGES}, "filter": FILTER, **QUIET}
    before = {name: p.detach().double().numpy().copy() for name, p in made.named_parameters()}
    optimizer = torch.optim.SGD(made.parameters(), lr=RATE)
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(made)
        optimizer = torch.optim.SGD(made.parameters(), lr=RATE)
        plugin = spectral_ds.attach(made, optimizer, section)
        language_loss(made).backward()
        optimizer.step()
        plugin.detach()
    else:
        config = tiny.deepspeed_config(int(engine[-1]), spectral_ds=section)
        trained = spectral_ds.initialize(model=made, optimizer=optimizer, config=config)[0]
        trained.backward(language_loss(trained))
        trained.step()
    after = {}
    for name, parameter in made.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            after[name] = whole.double().numpy().copy()
    return {name: (before[name] - after[name]) / RATE for name in before}


def test_rows_that_lie_otherwise_are_filtered_alike_on_shards(ranks):
    pool = ranks(2)
    for model in ("GPT-2", "GPT-OSS"):
        section = {"graph": {"edges": EDGES}, "filter": FILTER, **QUIET}
        _, _, alone, _ = one_step(MAKE[model](), section, language_loss)
        largest = max(np.abs(change).max() for change in alone.values())
        for engine in ("zero2", "zero3", "fsdp2"):
            moved = pool.run(sharded, model, engine)[0]
            assert moved.keys() == alone.keys()
            for name, change in alone.items():
                assert np.abs(moved[name] - change).max() <= 1e-5 * largest, (engine, name)


# The plan knows where nodes lie


STORED = {
    "usual": {},
    "input first": {"b": Storage(is_input_first=True)},
    "stacked": {name: Storage(is_stacked=True) for name in "abc"},
    "some stacked and input first": {
        "a": Storage(is_stacked=True, is_input_first=True),
        "c": Storage(is_stacked=True),
    },
}


def stored_nodes(storage, node):
    """Parameters of several blocks; some have nodes of equal width, as rows and as columns."""
    kinds = {"a": (4, 6, 5), "b": (6, 5), "c": (4, 6), "d": (5, 6)}
    shapes = {f"layers.{b}.{kind}": shape for b in range(2) for kind, shape in kinds.items()}
    stored = {name: storage[name[-1]] for name in shapes if name[-1] in storage}
    return shapes, list(parameter_nodes(shapes, node, stored).values())


@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2"])
@pytest.mark.parametrize("stored", STORED)
def test_every_rank_sends_and_receives_what_is_planned(engine, stored):
    world_size = 5
    cluster = planning.Cluster(world_size, 1)
    for node in ("row", "column", "element"):
        shapes, parameters = stored_nodes(STORED[stored], node)
        cuts = planning.cut_parameters(engine, shapes, world_size)
        layout = planning.shard_layout(cuts, world_size)
        for families in ([Depth()], [Ring()], [Depth(), Ring()]):
            groups = plan_groups(parameters, families, cuts, cluster)
            for group in groups:
                members = group.parameters
                if group.is_path:
                    members = [replace(each, kind="parameter") for each in members]
                bucket = Bucket.of(members)
                needed = needed_by_brute_force(bucket, families, layout)
                same_flow(group.boundary.hop, needed, cluster)
                same_flow(group.transpose, moved_by_brute_force(bucket, layout), cluster)
                touched = cluster.by_rank(group.parts.rank, group.parts.touched)
                assert touched.tolist() == bucket.touched(layout).tolist()
            edges = sum(group.edges[0] for group in groups)
            assert edges == counted(groups, families)
            by_width = {group.parts.width: [] for group in groups}
            for group in groups:
                by_width[group.parts.width].append(group)
            for alike in by_width.values():  # what is packed together
                both = joined([group.parts for group in alike])
                columns = both.columns(cluster)
                members = [p for group in alike for p in group.parameters]
                if alike[0].is_path:
                    members = [replace(each, kind="parameter") for each in members]
                for rank, own in enumerate(layout.fragments):
                    held = np.zeros(both.width, bool)
                    for part in Bucket.of(members).rectangles(by_parameter(own)):
                        held[part.column : part.column + part.columns] = True
                    assert columns[rank] == held.sum()


def counted(groups, families):
    """Undirected edges, one by one."""
    found = 0
    for group in groups:
        first = np.cumsum([0, *(p.nodes for p in group.parameters)])
        nodes = np.arange(first[-1])
        one_way = [family.edges(group.parameters, first, nodes) for family in families]
        pairs = {
            (i, *sorted(pair))
            for i, edges in enumerate(one_way)
            for pair in zip(edges.source.tolist(), edges.target.tolist(), strict=True)
        }
        found += len(pairs)
    return found


@pytest.mark.parametrize("node", ["row", "column"])
def test_similar_nodes_are_planned_within_each_matrix(node):
    shapes = {"a": (8, 30, 20)}
    storage = {"a": Storage(is_stacked=True, is_input_first=True)}
    parameters = list(parameter_nodes(shapes, node, storage).values())
    cluster = planning.Cluster(4, 1)
    cuts = planning.cut_parameters("zero3", shapes, 4)
    [group] = plan_groups(parameters, [Similarity(neighbours=3)], cuts, cluster)
    nodes = {"row": 20, "column": 30}[node]
    assert group.edges[1:] == (8 * nodes * 3 / 2, 8 * nodes * 3)
    assert group.boundary.hop.total == 0  # each rank owns two whole matrices
    assert group.links.tolist() == [group.all_links / 4] * 4


# What the user is told


def test_inspect_says_which_dimension_is_the_output(tmp_path, capsys):
    from spectral_ds.cli import main

    tiny.gpt2().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--eigenvalues", "1"]) == 0
    [line] = [text for text in capsys.readouterr().out.splitlines() if "stored as" in text]
    assert line.startswith("stored as (inputs, outputs); a row is one output: ")
    assert "transformer.h.*.attn.c_attn.weight" in line
    assert ParameterNodes("e", (4, 3, 2), storage=Storage(True, True)).dimensions == (
        "(experts, inputs, outputs)"
    )
    assert ParameterNodes("e", (4, 3), storage=Storage(True)).dimensions == "(experts, outputs)"
