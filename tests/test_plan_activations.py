"""What a plan predicts of graphs of activations is what ranks then send, and hold."""

import functools

import cells
import numpy as np
import pytest
import tiny
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
)

from spectral_ds import planning
from spectral_ds.coactivation import Observer, Projections, calibrate, random_batches
from spectral_ds.config import load_config
from spectral_ds.geometry.buckets import bucket_elements
from spectral_ds.graph import parameter_nodes
from spectral_ds.planning.shared_inputs import by_shared_input
from spectral_ds.sharding import Communicator
from spectral_ds.stack import facts_of, sites_among

CPU = torch.device("cpu")
EDGE = {"family": "activations", "rank": 5, "keep": "given"}
UPDATES = {"response": "tikhonov", "strength": 1.0, "apply_to": "update"}
PENALTY = {"strength": 1e-3, "coupling": "decoupled"}


def section(filter_=UPDATES, regularizer=None, monitored=True, **edge):
    graph = {"node": "column", "edges": [{**EDGE, **edge}]}
    found = {"graph": graph, "filter": filter_, "monitor": {"enabled": monitored, "interval": 1}}
    return found if regularizer is None else {**found, "regularizer": regularizer}


SECTIONS = {
    "updates": section(),
    "pull": section(regularizer=PENALTY),
    "more directions than inputs": section(rank=30, regularizer=PENALTY),
    "what is learned": section(learn="training", samples=1, length=1),
    "looking only": section({"strength": 0.0}),
    "not monitored": section(monitored=False),
}


def measured(name):
    """By section what this rank sends and holds."""
    training, found = cells.Training(name, None, rates=(1e-3, 1e-3)), {}
    for label, each in SECTIONS.items():
        training.attach(each)
        training.plugin.calibrate(tiny.batches(2))
        training.train(2)  # what is learned is known from the second step on
        graph = training.plugin.stack.graphs[0]
        cut = graph._operator._cut
        found[label] = {
            "step": graph.bytes_sent(each["filter"]["strength"]),
            "evaluation": graph._operator.bytes_sent,
            "scratch": graph._operator.scratch_bytes + buffers(cut._buffers),
            "directions": device_bytes(graph),
            "nodes": graph.num_nodes,
        }
        training.plugin.detach()
    training.close()
    return found


def buffers(pair):
    return 0 if pair is None else 4 * (pair.send.numel() + pair.receive.numel())


def device_bytes(graph):
    """Of all directions, each memory once; those of the step's learning rate are as many."""
    bases = [factors.basis for factors in graph._directions.values()]
    if graph.filter._factors:
        bases += [t for f in graph.filter._factors.values() for t in (f.basis, f.product)]
    of_step = []
    if graph.penalty is not None:
        factors = graph.penalty._factors.values()
        bases += [t for f in factors for t in (f.basis, f.product)]
        of_step = [f.product for f in factors]
    held = [*{t.data_ptr(): t for t in bases}.values(), *of_step]
    return sum(t.numel() * t.element_size() for t in held)


@functools.cache
def tiny_model():
    """What a plan knows of the tiny model, and its optimizer's parameter groups."""
    model = tiny.TinyLlama()
    name_of = {id(p): n for n, p in model.named_parameters()}
    groups = [[name_of[id(p)] for p in g["params"]] for g in tiny.parameter_groups(model)]
    return planning.Model.of("tiny", model), groups


@functools.cache
def planned(label, engine, world_size):
    model, groups = tiny_model()
    return planning.plan_configuration(
        model,
        load_config(SECTIONS[label]),
        engine,
        planning.Cluster(world_size, 2),
        planning.Machine(),
        bucket_elements(CPU),
        groups,
    )


@pytest.mark.parametrize(
    ("engine", "world_size"), [("zero1", 2), ("zero2", 4), ("zero3", 2), ("zero3", 4), ("fsdp2", 2)]
)
def test_bytes_and_memory_are_those_of_the_engine(ranks, engine, world_size):
    by_rank = ranks(world_size).run(measured, engine)
    for label in SECTIONS:
        plan = planned(label, engine, world_size)
        [graph], facts = plan.graphs, [each[label] for each in by_rank]
        assert plan.bytes_sent == facts[0]["step"], label
        sent = 4 * graph.columns * graph.cut.flow.sent
        assert sent.tolist() == [each["evaluation"] for each in facts], label
        assert (sent.sum() > 0) == (engine != "fsdp2")
        assert graph.memory["scratch"].tolist() == [each["scratch"] for each in facts], label
        # `spare` is a layer that nothing ever enters: shapes do not tell.
        held, least = graph.memory["directions"], np.array([each["directions"] for each in facts])
        spare = 4 * 24 * graph.edge.rank * 5
        assert (least <= held).all(), label
        assert (held <= least + spare).all(), label
        assert graph.all_nodes == facts[0]["nodes"] + 24


def test_more_is_planned_where_something_is_learned():
    keep, learn = (planned(label, "zero3", 4) for label in ("updates", "what is learned"))
    assert learn.bytes_sent == 2 * keep.bytes_sent
    assert learn.cost.flops.sum() > 1.5 * keep.cost.flops.sum()
    assert learn.host_memory["known directions"].min() == pytest.approx(
        2 * keep.host_memory["known directions"].min()
    )
    for plan in (keep, learn):
        assert "weights before the step" in plan.device_memory


def test_operations_are_four_a_direction_and_element():
    plan = planned("updates", "fsdp2", 2)
    [graph] = plan.graphs
    elements = sum(p.numel for group in graph.groups for p in group)
    assert graph.filter.flops.sum() == 4 * EDGE["rank"] * elements
    [looking] = planned("looking only", "fsdp2", 2).graphs
    assert looking.filter is None


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_who_shares_inputs_by_name_is_who_does_in_the_model(kind):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        model = tiny.LlamaForCausalLM(tiny.llama_config(num_key_value_heads=2))
    elif kind == "bert":
        model = BertModel(BertConfig(vocab_size=53, intermediate_size=24, **small))
    elif kind == "t5":
        small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
        gated = T5Config(vocab_size=53, feed_forward_proj="gated-gelu", **small)
        model = T5EncoderModel(gated)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=2, n_head=2))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {n: tuple(p.shape) for n, p in named.items()}
    facts = facts_of([model], named)
    nodes = [
        p
        for p in parameter_nodes(shapes, "column", facts.storage).values()
        if p.name not in facts.embeddings | facts.heads and "pooler" not in p.name
    ]
    sites = sites_among([model], named, nodes)
    batches = random_batches(model, 2, 8, 0)
    found = calibrate(model, sites, batches, 4, 0, Communicator.alone(CPU), lambda done: None)
    leaders = {}
    for name, leader in found.leaders.items():
        leaders.setdefault(leader, set()).add(name)
    with_inputs = planning.Model.of("", model).with_inputs
    told = by_shared_input([p for p in nodes if p.name in with_inputs])
    assert sorted(map(sorted, leaders.values())) == sorted(sorted(p.name for p in g) for g in told)


def test_what_calibration_holds_is_planned():
    model = tiny.LlamaForCausalLM(tiny.llama_config(num_hidden_layers=1, intermediate_size=150))
    plan = planning.plan_configuration(
        planning.Model.of("", model),
        load_config(section(rank=4)),
        "zero3",
        planning.Cluster(2, 1),
        planning.Machine(),
        2**19,
    )
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    nodes = parameter_nodes({n: tuple(p.shape) for n, p in named.items()}, "column")
    nodes = [p for n, p in nodes.items() if "proj" in n]
    projections, held = Projections(4, 0, CPU), 0
    observer = Observer(model, sites_among([model], named, nodes), projections, CPU)
    observer.start()
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    observer.stop()
    held = sum(8 * moments.sums.numel() for moments in observer.moments.values())
    held += sum(4 * o.numel() for n in (24, 150) if (o := projections.of(n)) is not None)
    assert plan.calibration == held
    assert any(moments.omega is not None for moments in observer.moments.values())
    assert any(moments.omega is None for moments in observer.moments.values())


def test_a_gpt2_row_lies_on_all_ranks_of_zero3():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=1, n_head=2))
    plan = planning.plan_configuration(
        planning.Model.of("", model),
        load_config(section()),
        "zero3",
        planning.Cluster(4, 2),
        planning.Machine(),
        2**19,
    )
    [graph] = plan.graphs
    # Inputs are dimension 0: each rank has some inputs of every output.
    for group in graph.groups:
        for parameter in group:
            expected = 2 * 3 * parameter.width
            assert graph.cut.sent[parameter.name] == expected
