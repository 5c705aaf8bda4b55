"""Ranks send each other what they need, once, and no more, and then multiply as one would."""

import zlib
from collections import Counter
from contextlib import contextmanager
from math import prod

import numpy as np
import oracle
import pytest
import tiny
import torch
from cells import Training
from traffic import counting_bytes

from spectral_ds.laplacian import Work, plan_operators
from spectral_ds.laplacian.boundary import BoundaryExchange
from spectral_ds.sharding import ShardLayout

EDGES = {
    "similarity": [{"family": "similarity"}],
    "role": [{"family": "similarity", "neighbours": 2, "scope": "role"}],
    "depth": [{"family": "depth"}],
    "ring and pair": [{"family": "ring"}, {"family": "pair"}],
}
GRAPHS = {
    "similarity": {"edges": EDGES["similarity"]},
    "role": {"edges": EDGES["role"]},
    "depth": {"edges": EDGES["depth"]},
    "columns": {"edges": EDGES["ring and pair"], "node": "column"},
    "elements": {"edges": EDGES["ring and pair"], "node": "element"},
}

PENALTY = {"strength": 0.1, "response": "heat"}
SECTIONS = {
    "filter": {"filter": {"response": "heat"}},
    "filter, bfloat16": {
        "filter": {"response": "heat"},
        "operator": {"exchange_dtype": "bfloat16"},
    },
    "updates and a penalty": {
        "filter": {"response": "window", "alpha": 0.4, "apply_to": "update"},
        "regularizer": {"strength": 0.1, "coupling": "decoupled"},
    },
    "penalty of weights": {"regularizer": {**PENALTY, "reference": "zero"}},
    "penalty alone": {"filter": {"response": "identity"}, "regularizer": PENALTY},
    "no strength": {"filter": {"strength": 0.0}, "regularizer": PENALTY},
}

# How rows meet, and how many elements of a bucket a rank may hold: few make slices of columns.
PLANS = {
    "boundary": ("boundary", 2000),
    "transpose": ("transpose", 2**20),
    "transpose of slices": ("transpose", 2000),
}


def facts(stage):
    """For each graph what this rank owns; for each plan what it sends, receives and multiplies."""
    training = Training(f"zero{stage}", None, rates=tiny.ADAM_RATES)
    found = {}
    for label, graph in GRAPHS.items():
        section = {
            "graph": graph,
            "operator": {"kernel": "torch_csr"},
            "monitor": {"enabled": False},
        }
        training.attach(section)
        found[label] = facts_of(training.plugin)
        training.plugin.detach()
    found["sent"] = {
        (graph, label): sent_in_a_step(training, graph, section)
        for graph in ("role", "depth")
        for label, section in SECTIONS.items()
    }
    training.close()
    return found


def sent_in_a_step(training, graph, section):
    """Bytes by the plan, by each way's plan, and what this rank sent in truth."""
    graph = {**GRAPHS[graph], "laplacian": "combinatorial"}
    training.attach({**section, "graph": graph, "monitor": {"enabled": False}})
    plugin = training.plugin
    [stage] = plugin.stack.graphs
    with counting_bytes() as sent:
        training.step()
    by_way = [
        plan_of(plugin, way, stage.plan.work, 2000).bytes_sent for way in ("boundary", "transpose")
    ]
    plugin.detach()
    return stage.plan.bytes_sent, by_way, sum(sent)


def plan_of(plugin, way, work, bucket_elements):
    [stage], engine = plugin.stack.graphs, plugin.engine
    return plan_operators(
        stage.graph,
        ShardLayout.gather(engine.fragments, engine.communicator),
        engine.communicator,
        engine.everyone,
        work=work,
        exchange=way,
        kernel="torch_csr",
        bucket_elements=bucket_elements,
    )


def facts_of(plugin):
    [stage], engine = plugin.stack.graphs, plugin.engine
    graph, hops = stage.graph, stage.filter.transfer.hops
    found = {
        "parameters": graph.parameters,
        "laplacian": graph.laplacian(),
        "owned": [
            (f.parameter, f.start, f.length)
            for f in engine.fragments
            if tiny.is_filtered(f.parameter)
        ],
        "hops": hops,
        "auto bytes": stage.plan.bytes_sent,
    }
    for label, (way, bucket_elements) in PLANS.items():
        moves_of = boundary_moves if way == "boundary" else transpose_moves
        with buckets_of_exchanges() as buckets:
            plan = plan_of(plugin, way, Work(hops, transposes=2), bucket_elements)
        found[label] = {
            "bytes": plan.bytes_sent,
            "moves": moves_of(plan, buckets, engine.fragments),
            "product": product(plan.shipments, graph.lambda_max, engine.fragments),
        }
    return found


def product(shipments, lambda_max, fragments):
    """L x on this rank's fragments of the graph; x is `signal_of` each parameter."""
    x = [signal_of(f.parameter, f.start, f.length) for f in fragments]
    for shipment in shipments:
        for matrix in (matrix for operator in shipment.operators for matrix in operator.scratch):
            matrix.values.fill_(torch.nan)
        for operator in shipment.carry(x):
            scratch = operator.scratch
            operator.apply(scratch.x, scratch.out)
            own = scratch.x.values[: operator.block.own]
            scratch.out.values.add_(own).mul_(lambda_max / 2)
    pairs = zip(fragments, x, strict=True)
    return [each.numpy() for f, each in pairs if tiny.is_filtered(f.parameter)]


def signal_of(parameter, start, length):
    """Some numbers for elements `start` and on of a flat parameter."""
    place = np.arange(start, start + length) + zlib.crc32(parameter.encode()) % 1009
    return torch.from_numpy(np.sin(1.7 * place)).float()


@contextmanager
def buckets_of_exchanges():
    """Collects the bucket of each boundary exchange that is planned, by the exchange's id."""
    buckets, plan_exchange = {}, BoundaryExchange.plan

    def remember(block, owners, communicator):
        exchange = plan_exchange(block, owners, communicator)
        buckets[id(exchange)] = owners.bucket
        return exchange

    BoundaryExchange.plan = remember
    try:
        yield buckets
    finally:
        BoundaryExchange.plan = plan_exchange


def boundary_moves(plan, buckets, fragments):
    """(peer, parameter, flat index) of all that comes in a hop, and of all that goes."""
    received, sent = [], []
    for operator in plan.operators:
        if operator.exchange is not None:
            bucket = buckets[id(operator.exchange)]
            received += elements(bucket, operator.exchange.receives)
            sent += elements(bucket, operator.exchange.sends)
    return received, sent


def transpose_moves(plan, buckets, fragments):
    """What stays, what goes to which peer, and where what comes from each peer is put."""
    stays, sends, receives = [], [], []
    for transposition in (operator.transposition for operator in plan.operators):
        if transposition is not None:
            stays += [flat_indices(p.rectangle, fragments) for p in transposition.block.placements]
            for peer, parts in enumerate(transposition.sends):
                sends += [(peer, place(p), flat_indices(p, fragments)) for p in parts]
            for peer, parts in enumerate(transposition.receives):
                receives += [(peer, place(p)) for p in parts]
    return stays, sends, receives


def elements(bucket, runs_by_peer):
    """(peer, parameter, flat index) of each address of a bucket."""
    flat = {p.name: places(p.shape, p.kind)[:, bucket.low :] for p in bucket.parameters}
    for peer, runs in enumerate(runs_by_peer):
        for start, end in runs:
            for address in range(start, end):
                node, column = divmod(address, bucket.width)
                position = np.searchsorted(bucket.first_node, node, side="right") - 1
                name = bucket.parameters[position].name
                yield peer, name, int(flat[name][node - bucket.first_node[position], column])


def places(shape, kind):
    """The flat index of every element, (nodes, width)."""
    flat = np.arange(prod(shape)).reshape(shape)
    nodes = flat.reshape(1, -1) if kind == "parameter" else oracle.as_nodes(flat, kind)
    return nodes.astype(np.int64)


def flat_indices(part, fragments):
    """(parameter, flat indices) of a rectangle of a fragment."""
    fragment = fragments[part.fragment]
    values = part.view(torch.arange(fragment.start, fragment.start + fragment.length))
    return fragment.parameter, values.reshape(-1).tolist()


def place(part):
    """Where a rectangle lies in the bucket's slice of one rank."""
    return part.node, part.column, part.nodes, part.columns


def owners_of(results):
    """{(parameter, flat index): rank}."""
    return {
        (name, index): rank
        for rank, result in enumerate(results)
        for name, start, length in result["owned"]
        for index in range(start, start + length)
    }


def neighbours_of(result):
    """{(parameter, flat index): the same of its neighbours in the graph}, by brute force."""
    nodes = [
        [(p.name, int(index)) for index in node]
        for p in result["parameters"]
        for node in places(p.shape, p.kind)
    ]
    neighbours = {element: [] for node in nodes for element in node}
    laplacian = result["laplacian"].tocoo()
    for a, b, value in zip(laplacian.row, laplacian.col, laplacian.data, strict=True):
        if a == b or value == 0:
            continue
        for element, other in zip(nodes[a], nodes[b], strict=True):
            neighbours[element].append(other)
    return neighbours


@pytest.fixture(
    scope="module",
    # ZeRO-1 cuts parameters as ZeRO-2 does.
    params=[(1, 2), (2, 3), (3, 3)],
    ids="zero{0[0]}-{0[1]}-ranks".format,
)
def cell(request, ranks):
    """(ZeRO stage, what each rank sent, by graph the facts of each rank)."""
    stage, world_size = request.param
    by_rank = ranks(world_size).run(facts, stage)
    by_label = {label: [result[label] for result in by_rank] for label in (*GRAPHS, "sent")}
    return stage, by_label.pop("sent"), by_label


def test_each_boundary_element_comes_once_and_nothing_else(cell):
    stage, _, graphs = cell
    for label, results in graphs.items():
        owner, neighbours = owners_of(results), neighbours_of(results[0])
        total = 0
        for rank, result in enumerate(results):
            needed = {
                (owner[other], *other)
                for element, its_rank in owner.items()
                if its_rank == rank
                for other in neighbours[element]
                if owner[other] != rank
            }
            received, sent = result["boundary"]["moves"]
            assert Counter(received) == Counter(needed)  # each once
            assert Counter(sent) == Counter(
                (peer, *element)
                for peer, other in enumerate(results)
                for source, *element in other["boundary"]["moves"][0]
                if source == rank
            )
            total += len(needed)
        assert all(r["boundary"]["bytes"] == 4 * r["hops"] * total for r in results)
        # ZeRO-3 cuts all parameters of a role alike: a depth path never leaves a rank.
        assert (total > 0) == ((label, stage) != ("depth", 3))


@pytest.mark.parametrize("plan", ["transpose", "transpose of slices"])
def test_a_transposed_element_stays_or_goes_to_one_rank(cell, plan):
    stage, _, graphs = cell
    for label, results in graphs.items():
        owner = owners_of(results)
        moved, total = Counter(), 0
        for rank, result in enumerate(results):
            stays, sends, receives = result[plan]["moves"]
            for name, indices in stays + [part for _, _, part in sends]:
                moved.update((name, index) for index in indices)
                assert all(owner[name, index] == rank for index in indices)
            for peer, other in enumerate(results):
                # What comes, and where it is put, is what the peer sends, in its order.
                come = [where for source, where in receives if source == peer]
                assert come == [where for to, where, _ in other[plan]["moves"][1] if to == rank]
            total += sum(len(indices) for _, _, (_, indices) in sends)
        names = {name for name, _ in moved}
        assert moved == Counter(element for element in owner if element[0] in names)
        assert all(r[plan]["bytes"] == 2 * 4 * total for r in results)  # there and back
        assert (total > 0) == ((label, stage) != ("depth", 3))


def test_auto_sends_no_more_than_either_way(cell):
    for results in cell[2].values():
        for result in results:
            least = min(result["boundary"]["bytes"], result["transpose"]["bytes"])
            assert result["auto bytes"] <= least
            assert (result["auto bytes"] > 0) == (least > 0)


@pytest.mark.parametrize("graph", ["role", "depth"])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_step_sends_what_its_plan_says_and_no_more_than_either_way(cell, graph, section):
    stage, by_rank, _ = cell
    results = [result[graph, section] for result in by_rank]
    for planned, by_way, _ in results:
        assert planned == sum(sent for _, _, sent in results)
        halves = 2 if section.endswith("bfloat16") else 1  # by each way it would be float32
        assert halves * planned <= min(by_way)
        assert (planned > 0) == ((graph, stage) != ("depth", 3))


@pytest.mark.parametrize("plan", PLANS)
def test_sharded_operators_multiply_by_the_whole_laplacian(cell, plan):
    for results in cell[2].values():
        expected = multiplied(results[0]["laplacian"], results[0]["parameters"])
        for result in results:
            ours = zip(result["owned"], result[plan]["product"], strict=True)
            for (name, start, length), found in ours:
                whole = expected[name]
                np.testing.assert_allclose(found, whole[start : start + length], atol=1e-5)


def multiplied(laplacian, parameters):
    """L x by flat parameter, in float64."""
    flat = {p.name: signal_of(p.name, 0, p.numel).double().numpy() for p in parameters}
    result = {name: np.empty_like(each) for name, each in flat.items()}
    first = np.cumsum([0, *(p.nodes for p in parameters)])
    for width in {p.width for p in parameters}:  # no edge joins nodes of different width
        x = np.zeros((first[-1], width))
        for p, node in zip(parameters, first[:-1], strict=True):
            if p.width == width:
                x[node : node + p.nodes] = flat[p.name][places(p.shape, p.kind)]
        y = laplacian @ x
        for p, node in zip(parameters, first[:-1], strict=True):
            if p.width == width:
                result[p.name][places(p.shape, p.kind)] = y[node : node + p.nodes]
    return result
