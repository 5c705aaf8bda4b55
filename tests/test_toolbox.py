"""Exchanges, responses, presets, schedules and everything else that acts on a step, by formulas.

Parameters by hand on one process; synthetic shards on the rank pools; short training runs of the
tiny model, sharded and on one process.
"""

import functools
import gc
import weakref
from contextlib import contextmanager

import numpy as np
import oracle
import pygsp
import pytest
import tiny
import torch
from cells import CELLS, Training
from test_spectrum import (
    CPU,
    Messages,
    Sharded,
    nodes_of,
    random_arrays,
    shards,
    smooth_bands,
)
from traffic import counting_bytes

import spectral_ds
from spectral_ds.filters import (
    FixedTransfer,
    GraphFilter,
    Heat,
    NormKeeper,
    StrengthSchedule,
    TemporalFilter,
)
from spectral_ds.graph import Depth, ParameterNodes, Ring, Similarity
from spectral_ds.laplacian import ParameterGraph, WeightFeatures, Work, plan_operators
from spectral_ds.monitor import ENOUGH_SAMPLES
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.spectrum import chebyshev_moments

BLOCKS = {
    f"l.{i}.{n}": s for i in range(4) for n, s in {"w": (11, 5), "b": (7,), "u": (6, 40)}.items()
}
CASES = {
    "similarity of rows": (BLOCKS, [Similarity(3, "role")], "row", True),
    "similarity of columns": (BLOCKS, [Similarity(3)], "column", False),
    "ring of elements": (BLOCKS, [Ring(), Depth(0.5)], "element", False),
    "depth": (BLOCKS, [Depth()], "row", False),
    "depth of columns": (BLOCKS, [Depth(2.0)], "column", True),
    "depth and ring": ({"stem": (400, 3), **BLOCKS}, [Depth(), Ring()], "row", False),
    "few elements": ({"l.0.w": (2, 1), "l.1.w": (2, 1), "l.2.w": (2, 1)}, [Depth()], "row", False),
    "few elements in a ring": ({"w": (3, 2)}, [Ring()], "row", True),
}
HEAT = Heat(0.7)


def sharded_of(name, alone=False):
    shapes, families, kind, normalized = CASES[name]
    return Sharded(random_arrays(shapes), families, kind, normalized, alone=alone)


def signal_of(name):
    return random_arrays(CASES[name][0], 1)


def filtered_on_ranks(name):
    """Hops; by exchange: filtered signal; bytes sent, as counted and as planned; groups."""
    sharded = sharded_of(name)
    transfer = FixedTransfer(
        HEAT, sharded.graph.lambda_max, sharded.graph.only_paths, "best", 1e-7, CPU
    )
    found = {}
    ways = {"boundary": 2**20, "transpose": 2**20, "best": 2**20, "best, small buckets": 50}
    for way, bucket_elements in ways.items():
        plan = sharded.plan(
            sharded.graph,
            sharded.layout,
            work=Work(transfer.hops, transposes=2),
            exchange=way.partition(",")[0],
            bucket_elements=bucket_elements,
        )
        for operator in plan.operators:
            for matrix in operator.scratch:
                matrix.values.fill_(torch.nan)
        signal = sharded.local(signal_of(name))
        with counting_bytes() as sent:
            GraphFilter(plan.operators, transfer).apply(signal, 0.9)
        total = sum(sharded.communicator.gather_objects(sum(sent)))
        found[way] = sharded.whole(signal), total, plan.bytes_sent, plan.exchanges
    return transfer.hops, found


def by_dense_laplacian(graph, kind, function, signal):
    """f(L) X by numpy; equal widths together."""
    result = {}
    nodes = {name: nodes_of(array, kind) for name, array in signal.items()}
    for width in {each.shape[1] for each in nodes.values()}:
        names = [name for name, each in nodes.items() if each.shape[1] == width]
        values, vectors = np.linalg.eigh(graph.laplacian(names).toarray())
        matrix = (vectors * function(values)) @ vectors.T
        filtered = matrix @ np.concatenate([nodes[name] for name in names])
        for name in names:
            own, filtered = np.split(filtered, [len(nodes[name])])
            is_transposed = kind == "column" and signal[name].ndim > 1
            result[name] = (own.T if is_transposed else own).reshape(signal[name].shape)
    return result


def bytes_by_hand(name, world_size, hops):
    """Bytes of each way, (boundary, transpose), group by group, from who owns which element."""
    shapes, _, kind, _ = CASES[name]
    graph = sharded_of(name, alone=True).graph
    owner = {n: np.zeros(shape, int) for n, shape in shapes.items()}
    for rank, fragments in enumerate(shards(owner, world_size)):
        for fragment in fragments:
            owner[fragment.parameter].reshape(-1)[fragment.start : fragment.end] = rank
    found = []
    for group in graph.groups:
        names = [parameter.name for parameter in group.parameters]
        ranks = np.concatenate([nodes_of(owner[n], kind) for n in names])  # (nodes, width)
        joined = graph.laplacian(names).toarray() != 0
        needed = {
            (rank, other, column)
            for (node, column), rank in np.ndenumerate(ranks)
            for other in np.flatnonzero(joined[node])
            if ranks[other, column] != rank
        }
        if group.is_path:  # all elements of a parameter have the same neighbours
            ranks = np.stack([owner[n].reshape(-1) for n in names])
        share = np.cumsum(np.bincount(ranks.reshape(-1), minlength=world_size)) / ranks.size
        slice_owner = np.searchsorted(
            np.rint(share * ranks.shape[1]), np.arange(ranks.shape[1]), side="right"
        )
        away = (ranks != slice_owner).sum()
        found.append((4 * hops * len(needed), 2 * 4 * away if needed else 0))
    return np.array(found)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_both_exchanges_give_the_filtered_signal_and_send_what_the_plan_says(
    ranks, name, world_size
):
    alone = sharded_of(name, alone=True)
    expected = by_dense_laplacian(
        alone.graph, CASES[name][2], lambda v: 0.1 + 0.9 * np.exp(-0.7 * v), signal_of(name)
    )
    results = ranks(world_size).run(filtered_on_ranks, name)
    boundary, transpose = bytes_by_hand(name, world_size, results[0][0]).T
    wins = np.count_nonzero(transpose < boundary)
    loses = np.count_nonzero(boundary) - wins
    by_hand = {
        "boundary": (boundary.sum(), wins + loses, 0),
        "transpose": (transpose.sum(), 0, wins + loses),
        "best": (np.minimum(boundary, transpose).sum(), loses, wins),
    }
    if (name, world_size) == ("depth and ring", 4):
        assert min(wins, loses) > 0
    for result in results:
        for way, (filtered, counted, planned, exchanges) in result[1].items():
            assert counted == planned
            if way in by_hand:  # small buckets divide columns anew, with other rounding
                assert (counted, exchanges["boundary"], exchanges["transpose"]) == by_hand[way]
            for parameter, value in expected.items():
                np.testing.assert_allclose(filtered[parameter], value, atol=2e-6)


# Responses and presets, on one process, with gradients by hand


class Blocks(torch.nn.Sequential):
    """Blocks of equal shape; nobody calls it."""

    def __init__(self, blocks=5):
        torch.manual_seed(0)
        super().__init__(*(torch.nn.Linear(6, 12) for _ in range(blocks)))


def gradients_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.randn(p.shape, generator=generator) for n, p in named.items()}


def set_gradients(model, gradients):
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None


def gradients_now(model):
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


@contextmanager
def attached(model, section, optimizer=torch.optim.SGD):
    """The model's optimizer and plugin."""
    stepper = optimizer(model.parameters(), lr=0.1)
    plugin = spectral_ds.attach(model, stepper, section)
    yield stepper, plugin
    plugin.detach()


def filtered_by_hand(section, model=None):
    """Gradients before and after one filter, and the graphs."""
    model = model or Blocks()
    gradients = gradients_of(model)
    with attached(model, section) as (_, plugin):
        set_gradients(model, gradients)
        plugin.filter_gradients()
        graphs = [stage.graph for stage in plugin.stack.graphs]
    return {n: g.numpy() for n, g in gradients.items()}, gradients_now(model), graphs


def check(filtered, expected, tolerance=1e-5):
    assert filtered.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(filtered[name], value, atol=tolerance, err_msg=name)


SIMILARITY = [{"family": "similarity", "neighbours": 3}]
EXACT = {"strength": 1.0, "tolerance": 1e-6}


@pytest.mark.parametrize("kind", ["normalized", "combinatorial"])
@pytest.mark.parametrize("method", ["exact", "chebyshev"])
def test_responses_equal_those_of_pygsp(kind, method):
    model = torch.nn.Sequential(torch.nn.Linear(6, 40, bias=False))
    section = {"graph": {"edges": SIMILARITY, "laplacian": "combinatorial"}}
    adjacency = -filtered_by_hand(section, model)[2][0].laplacian().toarray()
    np.fill_diagonal(adjacency, 0)
    graph = pygsp.graphs.Graph(adjacency, lap_type=kind)
    graph.compute_fourier_basis()
    filters = {
        ("heat", "tau", 1.5): pygsp.filters.Heat(graph, scale=1.5 * graph.lmax),
        ("tikhonov", "tau", 2.0): pygsp.filters.Filter(graph, lambda v: 1 / (1 + 2 * v)),
        ("window", "alpha", 0.6): pygsp.filters.Filter(graph, lambda v: 1 - 0.3 * v),
    }
    for (response, key, value), reference in filters.items():
        section = {
            "graph": {"edges": SIMILARITY, "laplacian": kind},
            "filter": {"response": response, key: value, **EXACT},
        }
        gradients, filtered, _ = filtered_by_hand(section, model)
        expected = reference.filter(gradients["0.weight"].astype(float), method=method, order=50)
        check(filtered, {"0.weight": expected})


STEPS = {
    "lowpass": ({"cutoff": 0.3}, (0, 0.3, 1), (1, 0), 32),
    "highpass": ({"cutoff": 0.6, "order": 20}, (0, 0.6, 1), (0, 1), 21),
    "bandpass": ({"low": 0.2, "high": 0.55}, (0, 0.2, 0.55, 1), (0, 1, 0), 32),
    "bands": ({"gains": [1, 0.2, 2, -1]}, (0, 0.25, 0.5, 0.75, 1), (1, 0.2, 2, -1), 32),
    "many bands": (
        {"response": "bands", "gains": [1, 0] * 5},
        np.linspace(0, 1, 11),
        (1, 0) * 5,
        40,
    ),
}


@pytest.mark.parametrize("edges", [SIMILARITY, [{"family": "depth"}]])
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_series_that_jackson_damps(name, edges):
    settings, borders, gains, count = STEPS[name]
    section = {
        "graph": {"edges": edges, "laplacian": "combinatorial"},
        "filter": {"response": name, "strength": 0.8, **settings},
    }
    gradients, filtered, [graph] = filtered_by_hand(section)

    def response(values):
        return 0.2 + 0.8 * np.array(gains) @ smooth_bands(borders, count, values / graph.lambda_max)

    check(filtered, by_dense_laplacian(graph, "row", response, gradients))
    if max(gains) <= 1 and min(gains) >= 0:  # damped series do not overshoot
        inside = response(np.linspace(0, graph.lambda_max, 1001))
        assert 0.2 - 1e-9 <= inside.min() < 0.25
        assert 0.95 < inside.max() <= 1 + 1e-9


@pytest.mark.parametrize("tau", [1.0, 10.0])
def test_laplacian_smoothing_inverts_a_circulant(tau):
    section = {
        "preset": "laplacian_smoothing",
        "filter": {"tau": tau},
        "monitor": {"enabled": False},
    }
    gradients, filtered, _ = filtered_by_hand(section, tiny.TinyLlama())
    expected = {}
    for name in filtered:
        flat = gradients[name].astype(float).reshape(-1)
        kernel = np.zeros(len(flat))
        kernel[[0, 1, -1]] = 1 + 2 * tau, -tau, -tau  # I + tau L, first row
        smooth = np.fft.ifft(np.fft.fft(flat) / np.fft.fft(kernel)).real
        expected[name] = smooth.reshape(gradients[name].shape)
    check(filtered, expected)


def window_smoothing(updates, alpha):
    """Eq. of arXiv 2606.30813: inside (1 − a) u_l + (a/2)(u_{l−1} + u_{l+1}), at the ends half."""
    last = len(updates) - 1
    smooth = []
    for layer, update in enumerate(updates):
        if layer in (0, last):
            neighbour = updates[1 if layer == 0 else last - 1]
            smooth.append((1 - alpha / 2) * update + alpha / 2 * neighbour)
        else:
            around = updates[layer - 1] + updates[layer + 1]
            smooth.append((1 - alpha) * update + alpha / 2 * around)
    return smooth


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_gradient_smoothing_averages_the_updates_of_neighbouring_blocks(optimizer):
    model, base = Blocks(), Blocks()
    usual = optimizer(base.parameters(), lr=0.1)
    with attached(model, {"preset": "gradient_smoothing"}, optimizer) as (stepper, _):
        for step in range(3):
            base.load_state_dict(model.state_dict())
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            for each, steps in ((model, stepper), (base, usual)):
                set_gradients(each, gradients_of(each, step))
                steps.step()
            moved = {n: p.detach() - before[n] for n, p in base.named_parameters()}
            for role in ("weight", "bias"):
                names = [f"{layer}.{role}" for layer in range(5)]
                smooth = window_smoothing([moved[n] for n in names], 0.4)
                for name, update in zip(names, smooth, strict=True):
                    expected = before[name] + update
                    torch.testing.assert_close(
                        model.get_parameter(name).detach(), expected, rtol=1e-6, atol=1e-6
                    )


def test_grokfast_adds_the_running_mean():
    model = Blocks(2)
    means = {}
    with attached(model, {"preset": "grokfast"}) as (stepper, _):
        for step in range(6):
            gradients = gradients_of(model, step)
            if step == 2:
                del gradients["0.weight"]
            if step == 3:
                gradients["1.bias"][3] = torch.inf
            set_gradients(model, gradients)
            stepper.step()
            if step == 3:  # no engine of this kind skips such a step, but the mean must
                assert not torch.isfinite(model[1].bias[3])
                continue
            for name, gradient in gradients.items():
                means[name] = 0.98 * means.get(name, gradient) + 0.02 * gradient
                torch.testing.assert_close(
                    model.get_parameter(name).grad, gradient + 2.0 * means[name]
                )
            if step == 2:
                assert model[0].weight.grad is None


def test_the_temporal_filter_keeps_its_mean_in_true_units():
    communicator = Communicator.alone(CPU)
    fragments = [Fragment("a", 0, 5), Fragment("b", 0, 3)]
    results = []
    for scales in ((1.0, 1.0, 1.0), (4.0, 4096.0, 0.5)):
        temporal = TemporalFilter(fragments, ["a", "b"], communicator, decay=0.6, amplify=1.5)
        for index, scale in enumerate(scales):
            generator = torch.Generator().manual_seed(index)
            gradients = [scale * torch.randn(n, generator=generator) for n in (5, 3)]
            temporal.apply(gradients, scale)
        results.append([*temporal.means, *(g / scales[-1] for g in gradients)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("edges", [SIMILARITY, [{"family": "depth"}]])
def test_rescale_keeps_every_norm_and_the_direction_of_the_filter(edges):
    settings = {"response": "heat", "tau": 3.0, "strength": 0.9}
    section = {"graph": {"edges": edges, "exclude": ["3.weight"]}, "filter": settings}
    gradients, usual, _ = filtered_by_hand(section)
    section["filter"] = {**settings, "rescale": "norm"}
    _, filtered, _ = filtered_by_hand(section)
    for name, gradient in gradients.items():
        norm = np.linalg.norm(gradient)
        expected = usual[name] * norm / np.linalg.norm(usual[name])
        np.testing.assert_allclose(filtered[name], expected, rtol=1e-5)
    np.testing.assert_array_equal(filtered["3.weight"], gradients["3.weight"])


def test_norms_of_zeros_and_of_missing_gradients_stay():
    keeper = NormKeeper([0, 1, 2], 3, Communicator.alone(CPU))
    signal = [torch.tensor([3.0, 4.0]), None, torch.zeros(2)]
    norms = keeper.norms(signal)
    assert norms.tolist() == [5, 0, 0]
    signal[0].mul_(0.1)
    keeper.restore(signal, norms)
    assert signal[0].tolist() == pytest.approx([3, 4])
    assert signal[2].tolist() == [0, 0]


def test_strength_rises_stays_and_falls():
    def strengths(steps, **settings):
        schedule = StrengthSchedule(0.8, **settings)
        return pytest.approx([schedule.at(step) for step in range(steps)])

    assert strengths(3) == [0.8] * 3
    assert strengths(6, warmup_steps=4) == [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    assert strengths(6, decay_steps=4) == [0.8, 0.6, 0.4, 0.2, 0, 0]
    assert strengths(7, warmup_steps=2, decay_steps=4) == [0.4, 0.8, 0.8, 0.6, 0.4, 0.2, 0]
    assert strengths(7, interval=3) == [0.8, 0, 0, 0.8, 0, 0, 0.8]
    assert strengths(5, warmup_steps=4, interval=2) == [0.2, 0, 0.6, 0, 0.8]


def test_each_step_filters_as_strongly_as_its_schedule_says():
    settings = {"strength": 0.8, "warmup_steps": 2, "decay_steps": 4, "interval": 2}
    section = {
        "graph": {"edges": [{"family": "depth"}], "laplacian": "combinatorial"},
        "filter": {"response": "heat", "tau": 0.5, **settings},
        "monitor": {"interval": 1},
    }
    model = Blocks()
    with attached(model, section) as (stepper, plugin):
        for step, strength in enumerate([0.4, 0, 0.8, 0, 0.4, 0, 0]):
            gradients = gradients_of(model, step)
            set_gradients(model, gradients)
            stepper.step()
            assert plugin.metrics()["strength"] == pytest.approx(strength)
            gradients = {n: g.numpy() for n, g in gradients.items()}
            if strength == 0:
                for name, gradient in gradients_now(model).items():
                    np.testing.assert_array_equal(gradient, gradients[name])
            else:

                def response(values, s=strength):
                    return 1 - s + s * np.exp(-0.5 * values)

                expected = by_dense_laplacian(plugin.graph, "row", response, gradients)
                check(gradients_now(model), expected)


def test_stacked_graphs_filter_from_both_sides():
    section = {
        "graphs": [
            {"edges": SIMILARITY, "exclude": ["*.bias"]},
            {"node": "column", "edges": SIMILARITY, "laplacian": "combinatorial",
             "exclude": ["*.bias", "1.weight"]},
        ],
        "filter": {"response": "tikhonov", "tau": 1.2, "strength": 1.0, "tolerance": 1e-7},
    }  # fmt: skip
    gradients, filtered, (rows, columns) = filtered_by_hand(section)
    expected = {n: g for n, g in gradients.items() if n.endswith("bias")}
    for name in gradients.keys() - expected.keys():
        left, right = (
            np.linalg.inv(np.eye(size) + 1.2 * graph.laplacian([name]).toarray())
            if name != "1.weight" or graph is rows
            else np.eye(size)
            for graph, size in ((rows, 12), (columns, 6))
        )
        expected[name] = left @ gradients[name] @ right
    check(filtered, expected)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize("settings", [{}, {"order": 2}, {"order": 30}, {"strength": 1.0}])
def test_observing_leaves_every_bit(apply_to, settings):
    weights = []
    for section in (None, {"preset": "observe", "filter": {"apply_to": apply_to, **settings}}):
        model = Blocks()
        stepper = torch.optim.AdamW(model.parameters(), lr=0.1)
        plugin = spectral_ds.attach(model, stepper, section) if section else None
        for step in range(3):
            set_gradients(model, gradients_of(model, step))
            stepper.step()
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        if plugin is not None:
            assert plugin.metrics()["gradient_norm/after"] > 0
    assert torch.equal(*weights)


def smooth_gradients(model, seed):
    """Signal that columns and rows share, and noise."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        signal = torch.linspace(0, 3, parameter.numel()).view(parameter.shape).sin()
        found[name] = signal + torch.randn(parameter.shape, generator=generator)
    return found


@pytest.mark.parametrize("preset", ["denoise", "whiten"])
def test_adaptive_filters_apply_the_gains_of_the_estimates(preset):
    section = {"preset": preset, "graph": {"refresh_interval": 6}, "filter": {"bands": 4}}
    model = Blocks(2)
    with attached(model, section) as (stepper, plugin):
        for step in range(15):
            gradients = {n: g.numpy() for n, g in smooth_gradients(model, step).items()}
            set_gradients(model, smooth_gradients(model, step))
            stepper.step()
            if step < 6:  # no graph yet
                check(gradients_now(model), gradients, 0)
                continue
            estimate = plugin.snr()
            total = estimate.signal + estimate.noise  # mean power
            # One sample on a new graph tells how strong its bands are, but not what is noise.
            assert total.any() == (step not in (6, 12))
            if preset == "denoise":
                gains = np.clip(estimate.signal / total, 0, 1) if total.any() else np.ones(4)
            else:
                total = plugin.stack.graphs[0].samples.statistics.power.numpy()
                gains = total**-0.5 * np.sqrt(total.sum() / 4)

            def response(values, gains=gains, graph=plugin.graph):
                borders = np.linspace(0, 1, 5)
                return gains @ smooth_bands(borders, 16, values / graph.lambda_max)

            kind = "column" if preset == "denoise" else "row"
            expected = by_dense_laplacian(plugin.graph, kind, response, gradients)
            check(gradients_now(model), expected)
            assert np.ptp(gains) > 0.1 or not (estimate.signal + estimate.noise).any()


@pytest.mark.parametrize("scope", ["parameter", "role"])
@pytest.mark.parametrize(("kind", "sketch_width"), [("row", 0), ("row", 4), ("column", 5)])
def test_edges_by_gradient_join_what_the_running_mean_says(scope, kind, sketch_width):
    edge = {
        "family": "similarity",
        "features": "gradient",
        "scope": scope,
        "neighbours": 3,
        "sketch_width": sketch_width,
    }
    section = {
        "graph": {
            "node": kind,
            "edges": [edge],
            "refresh_interval": 4,
            "laplacian": "combinatorial",
        },
        "filter": {"response": "identity"},
        "statistics": {"interval": 1, "decay": 0.7},
    }
    model = Blocks(3)
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    mean = dict.fromkeys(names, 0.0)
    with attached(model, section) as (stepper, plugin):
        for step in range(10):
            if step == 8:  # the graph is made before the step's own sample is taken
                expected = {n: mean[n] / (1 - 0.7**step) for n in names}
            gradients = smooth_gradients(model, step)
            for name in names:
                mean[name] = 0.7 * mean[name] + 0.3 * gradients[name].double().numpy()
            set_gradients(model, gradients)
            stepper.step()
        laplacian = plugin.graph.laplacian(names).toarray()
    adjacency = oracle.adjacency_of(expected, [edge], 0, kind, mean_gradients=expected)
    assert np.count_nonzero(adjacency) > 3 * len(adjacency)
    np.testing.assert_allclose(
        laplacian, oracle.laplacian_of(adjacency, "combinatorial"), atol=1e-5
    )


def test_a_graph_of_gradients_that_were_never_finite_stays_unknown():
    section = {
        "graph": {
            "edges": [{"family": "similarity", "features": "gradient"}],
            "refresh_interval": 3,
        },
        "filter": {"response": "highpass", "strength": 1.0},  # nodes without edges would lose all
        "statistics": {"interval": 1},
        "monitor": {"interval": 1},
    }
    model = Blocks(2)
    with Messages() as messages, attached(model, section) as (stepper, plugin):
        for step in range(10):
            gradients = smooth_gradients(model, step)
            if step < 3:
                gradients["0.weight"][2, 3] = (torch.inf, torch.nan, -torch.inf)[step]
            set_gradients(model, gradients)
            stepper.step()
            is_known = step >= 6  # the first refresh after finite samples
            assert plugin.stack.graphs[0].filter.is_ready == is_known
            assert (plugin.graph.num_edges > 0) == is_known
            same = [
                np.array_equal(gradient, gradients[name], equal_nan=True)
                for name, gradient in gradients_now(model).items()
            ]
            assert all(same) != is_known
            if step < 9:  # before this refresh too few samples on the graph
                assert messages.verdicts == []
    assert len(messages.verdicts) == 1


def test_nothing_is_said_of_a_graph_without_edges():
    section = {
        "graph": {"include": ["*.bias"], "edges": SIMILARITY},  # one node each
        "statistics": {"interval": 1},
        "monitor": {"interval": 1},
    }
    model = Blocks(2)
    with Messages() as messages, attached(model, section) as (stepper, plugin):
        for step in range(ENOUGH_SAMPLES + 1):
            set_gradients(model, smooth_gradients(model, step))
            stepper.step()
        assert plugin.snr().samples > ENOUGH_SAMPLES
    assert messages.verdicts == []


def test_a_response_that_no_longer_fits_a_new_graph_is_a_warning_and_training_goes_on(caplog):
    edge = {"family": "similarity", "features": "gradient", "neighbours": 64}
    section = {
        "graph": {"edges": [edge], "refresh_interval": 1, "laplacian": "combinatorial"},
        "filter": {"response": "tikhonov", "tau": 3e3, "strength": 1.0, "tolerance": 0.1},
        "monitor": {"enabled": False},
    }
    model = torch.nn.Sequential(torch.nn.Linear(6, 400, bias=False))
    with attached(model, section) as (stepper, plugin):
        before = model[0].weight.detach().clone()
        for step in range(2):
            gradients = gradients_of(model, step)
            set_gradients(model, gradients)
            warned = len(caplog.records)
            stepper.step()
        [warning] = caplog.records[warned:]
        assert warning.levelname == "WARNING"
        assert "filter.tau" in warning.getMessage()
        # It is filtered by the highest order that there is.
        transfer = plugin.stack.graphs[0].filter.transfer
        assert 0.1 < transfer.error < 0.5
        values, vectors = np.linalg.eigh(plugin.graph.laplacian().toarray())
        smooth = (vectors / (1 + 3e3 * values.clip(0))) @ vectors.T @ gradients["0.weight"].numpy()
        filtered = model[0].weight.grad.numpy()
        off = np.linalg.norm(filtered - smooth) / np.linalg.norm(gradients["0.weight"])
        assert off <= transfer.error
        assert np.abs(model[0].weight.detach().numpy() - before.numpy()).max() > 0


def test_rebuilding_the_graph_leaves_nothing_behind():
    section = {
        "graphs": [
            {"edges": [{"family": "similarity", "features": "gradient"}], "refresh_interval": 1},
            {"node": "column", "edges": SIMILARITY, "refresh_interval": 2},
        ],
        "filter": {"response": "whiten", "bands": 3},
        "statistics": {"interval": 1},
    }
    model = Blocks(2)
    gc.collect()
    gc.disable()  # what is replaced must go without help
    try:
        with attached(model, section) as (stepper, plugin):
            old = []
            for step in range(12):
                set_gradients(model, gradients_of(model, step))
                stepper.step()
                now = []
                for stage in plugin.stack.graphs:
                    now += [stage.graph, stage.plan, stage.filter]
                    now += [*stage.plan.operators, *stage.spectrometer.plan.operators]
                old += map(weakref.ref, now)
            alive = {id(each()) for each in old if each() is not None}
            assert alive == set(map(id, now))
    finally:
        gc.enable()


# Training, sharded and on one process

MLP = ["*.mlp.*", "*.o_proj.*"]
RATES = (0.5, 0.25)
STEPS_RUN = 4
METHODS = {
    "wiener": {
        "preset": "denoise",
        "graph": {"include": MLP, "refresh_interval": 2},
        "filter": {"rescale": "norm"},
    },
    "whiten": {
        "preset": "whiten",
        "graph": {
            "include": MLP,
            "edges": [{"family": "similarity", "features": "gradient", "scope": "role"}],
            "refresh_interval": 2,
        },
        "filter": {"temporal": {"decay": 0.7, "amplify": 1.5}, "interval": 3},
        "operator": {"exchange": "transpose"},
    },
    "stack": {
        "graphs": [
            {"include": MLP, "edges": [{"family": "similarity"}, {"family": "ring"}]},
            {"node": "column", "edges": [{"family": "similarity"}, {"family": "pair"}]},
        ],
        "filter": {"strength": 0.9, "warmup_steps": 2},
        "monitor": {"enabled": False},
        "operator": {"exchange": "boundary"},
    },
    "update": {
        "preset": "gradient_smoothing",
        "filter": {"rescale": "norm", "temporal": {"decay": 0.5, "amplify": 0.3}},
    },
    "laplacian_smoothing": {"preset": "laplacian_smoothing", "monitor": {"enabled": False}},
    "grokfast": {"preset": "grokfast", "monitor": {"enabled": False}},
}


def trained(name, method, optimizer=torch.optim.SGD):
    """Weights after a few steps; after each: edges and dense Laplacian, signal and noise."""
    section = METHODS[method] if method else None
    training = Training(CELLS[name], section, optimizer, RATES)
    graphs, powers = [], []
    for index in range(STEPS_RUN):
        training.step(index)
        if method in ("wiener", "whiten"):
            graph = training.plugin.graph
            graphs.append((graph.num_edges, graph.laplacian().toarray()))
            found = training.plugin.snr()
            powers.append((found.signal, found.noise))
    weights = training.snapshot()
    training.close()
    return weights, graphs, np.array(powers)


@pytest.fixture(scope="module")
def on_one_process(ranks):
    return functools.cache(lambda method: ranks(1).run(trained, "plain", method)[0])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("method", METHODS)
def test_sharded_training_equals_that_on_one_process(
    ranks, on_one_process, method, name, world_size
):
    weights, graphs, powers = on_one_process(method)
    unfiltered, *_ = on_one_process(None)
    moved = max(np.abs(weights[n] - unfiltered[n]).max() for n in weights)
    assert moved > 5e-3
    # The second sample on a graph tells signal from noise.
    assert not graphs or powers[-1].all()
    for other_weights, other_graphs, other_powers in ranks(world_size).run(trained, name, method):
        largest = np.abs(powers).max(initial=0)
        np.testing.assert_allclose(other_powers, powers, rtol=0, atol=1e-4 * largest)
        for parameter, value in weights.items():
            np.testing.assert_allclose(other_weights[parameter], value, atol=1e-6)
        for (edges, laplacian), (other_edges, other) in zip(graphs, other_graphs, strict=True):
            assert edges == other_edges
            np.testing.assert_allclose(other, laplacian, atol=1e-6)


@pytest.mark.parametrize("method", ["wiener", "whiten"])
def test_graphs_of_gradients_are_rebuilt_at_each_refresh_and_only_then(on_one_process, method):
    edges, laplacians = zip(*on_one_process(method)[1], strict=True)
    assert edges[0] == edges[1] == 0
    assert min(edges[2:]) > 0
    np.testing.assert_array_equal(laplacians[2], laplacians[3])


def observed(name, apply_to):
    """Weights after a few AdamW steps; without the plugin where `apply_to` is None."""
    section = None
    if apply_to is not None:
        section = {
            "preset": "observe",
            "filter": {"apply_to": apply_to},
            "statistics": {"interval": 1},
        }
    training = Training(CELLS[name], section, torch.optim.AdamW, tiny.ADAM_RATES)
    for index in range(2):
        training.step(index)
    weights = training.snapshot()
    training.close()
    return weights


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_observing_sharded_training_leaves_every_bit(ranks, name):
    usual = ranks(2).run(observed, name, None)[0]
    for apply_to in ("gradient", "update"):
        for weights in ranks(2).run(observed, name, apply_to):
            for parameter, value in usual.items():
                np.testing.assert_array_equal(weights[parameter], value)


def moments_of_a_rank_without_columns():
    """Moments by each exchange; rank 1 owns one element: no column of the slices."""
    communicator = Communicator(None, CPU)
    weights = torch.randn(8 * 512, generator=torch.Generator().manual_seed(0))
    cuts = [(0, 416), (416, 417), (417, 4096)]
    layout = ShardLayout(
        tuple((Fragment("w", first, last - first),) for first, last in cuts), communicator.rank
    )
    first, last = cuts[communicator.rank]
    parameters = [ParameterNodes("w", (8, 512))]
    graph = ParameterGraph.build(
        parameters,
        [Similarity(3)],
        layout,
        {"weights": WeightFeatures(layout.own, [weights[first:last]], 0, communicator)},
        communicator,
        normalized=True,
        progress=lambda done: None,
    )
    found = []
    for exchange in ("boundary", "transpose"):
        plan = plan_operators(
            graph,
            layout,
            communicator,
            communicator,
            work=Work(hops=3, transposes=2),
            exchange=exchange,
            kernel="torch_csr",
            bucket_elements=2**20,
        )
        signal = [weights[first:last].square()]
        found.append(chebyshev_moments(plan.operators, signal, 8, communicator).numpy())
    return found


def test_a_rank_without_columns_still_measures(ranks):
    for boundary, transpose in ranks(3).run(moments_of_a_rank_without_columns):
        np.testing.assert_allclose(transpose, boundary, atol=1e-6 * boundary[0])
