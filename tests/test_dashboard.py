"""What the figures are given is what dense numpy finds, and each array is drawn in its place."""

import numpy as np
import oracle
import pytest
import tiny
import torch
from cells import CELLS, Training
from matplotlib.container import BarContainer

from spectral_ds.monitor import (
    Board,
    Dashboard,
    FilterReading,
    GraphReading,
    StepReading,
    dashboard,
    graph_measurement,
)
from spectral_ds.spectrum import Density, SignalToNoise

BANDS, DECAY, STRENGTH = 4, 0.9, 0.8
EDGES = [{"family": "similarity", "neighbours": 3}, {"family": "depth"}]
# The adaptive response does nothing before the second sample, so that the second step is looked at.
SECTION = {
    "graph": {"edges": EDGES, "laplacian": "combinatorial"},
    "filter": {"response": "wiener", "bands": BANDS, "strength": STRENGTH},
    "statistics": {"interval": 1, "decay": DECAY},
    "regularizer": {"strength": 1e-9},
    "monitor": {"interval": 1, "figures_interval": 1, "bands": BANDS},
}


def facts_of_two_steps(name):
    """What was given to the figures of the second step, and the weights before either step."""
    usual, graph_measurement.DENSE_NODES = (
        graph_measurement.DENSE_NODES,
        1000,
    )  # nothing is estimated
    try:
        training = Training(CELLS[name], SECTION, rates=(1.0, 0.5))
        given = []
        shown = training.plugin.monitor._dashboard
        shown.board.is_open = True
        shown.show = lambda step, graph: given.append((step, graph))
        weights = []
        for index in range(2):
            weights.append(training.snapshot())
            training.step(index)
        found = given[-1], weights, shown.blocks, shown.roles
        training.close()
        return found
    finally:
        graph_measurement.DENSE_NODES = usual


def gradients_at(weights, index):
    """The gradient on the whole batch of a step, by name; zeros where nothing is used."""
    model = tiny.TinyLlama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    generator = torch.Generator().manual_seed(100 + index)
    model(torch.randint(0, 53, (tiny.GLOBAL_BATCH, 9), generator=generator)).backward()
    return {
        n: np.zeros(p.shape) if p.grad is None else p.grad.numpy().astype(np.float64)
        for n, p in model.named_parameters()
        if p.requires_grad
    }


class Dense:
    """The graph of some weights, whole, and spectra on it."""

    def __init__(self, weights):
        self.names = list(weights)
        self.adjacency = oracle.adjacency_of(weights, EDGES)
        self.laplacian = oracle.laplacian_of(self.adjacency, "combinatorial")
        self.highest = oracle.bound_of(self.adjacency, "combinatorial")
        self.values, self.vectors = np.linalg.eigh(self.laplacian)
        self.first, self.total = oracle.numbering(weights)
        degree = self.adjacency.sum(axis=1)
        sizes = {n: len(oracle.as_nodes(w)) for n, w in weights.items()}
        self.rows = {n: slice(self.first[n], self.first[n] + sizes[n]) for n in self.names}
        self.joined = {n for n in self.names if degree[self.rows[n]].any()}
        self.degree = degree

    def signals(self, gradients, names):
        """(nodes, width) for each width."""
        rows = {n: oracle.as_nodes(gradients[n]) for n in names}
        for width in {each.shape[1] for each in rows.values()}:
            x = np.zeros((self.total, width))
            for name, each in rows.items():
                if each.shape[1] == width:
                    x[self.rows[name]] = each
            yield x

    def in_bands(self, gradients):
        """Power in equal bands of what edges reach."""
        at = sum(
            np.square(self.vectors.T @ x).sum(axis=1) for x in self.signals(gradients, self.joined)
        )
        return np.array([self.step(np.eye(BANDS)[b])(self.place) @ at for b in range(BANDS)])

    def step(self, gains):
        return oracle.step_response(np.linspace(0, 1, BANDS + 1), gains, 4 * BANDS - 1)

    @property
    def place(self):
        return 2 * self.values / self.highest - 1

    def roughness(self, gradients):
        found = {}
        for x in self.signals(gradients, self.names):
            y = self.laplacian @ x
            for name in self.names:
                own = x[self.rows[name]]
                if own.any():
                    found[name] = np.sum(own * y[self.rows[name]]) / np.sum(own**2) / self.highest
        return found


def as_table(values, blocks, roles):
    table = np.full((len(blocks), len(roles)), np.nan)
    for name, value in values.items():
        role, block = oracle.role_and_block(name)
        if block is not None:
            table[blocks.index(block), roles.index(role)] = value
    return table


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_figures_are_given_what_dense_numpy_finds(ranks, name):
    (step, graph), weights, blocks, roles = ranks(2).run(facts_of_two_steps, name)[0]
    first, second = (gradients_at(w, index) for index, w in enumerate(weights))
    filtered = [n for n in first if tiny.is_filtered(n)]
    dense = Dense({n: weights[0][n] for n in filtered})

    # Means with weights that fall by DECAY a sample, and S + N and S + ρN of them.
    newest = (1 - DECAY) / (1 - DECAY**2)
    mean = {n: (1 - newest) * first[n] + newest * second[n] for n in filtered}
    power = (1 - newest) * dense.in_bands(first) + newest * dense.in_bands(second)
    concentration = (1 - newest) ** 2 + newest**2
    noise = (power - dense.in_bands(mean)) / (1 - concentration)
    signal = power - noise
    scale = np.abs(power).max()
    np.testing.assert_allclose(step.signal_to_noise.signal, signal, atol=1e-4 * scale)
    np.testing.assert_allclose(step.signal_to_noise.noise, noise, atol=1e-4 * scale)

    wiener = dense.step(np.clip(signal / (signal + noise), 0, 1))
    centers = (np.arange(BANDS) + 0.5) / BANDS
    np.testing.assert_allclose(step.filter.adaptive, wiener(2 * centers - 1), atol=1e-3)
    middles = (np.arange(32) + 0.5) / 16 - 1
    acting = 1 - STRENGTH + STRENGTH * wiener(middles)
    np.testing.assert_allclose(step.filter.gains, acting, atol=1e-3)
    assert step.filter.strength == STRENGTH
    after = oracle.apply_function(
        dense.laplacian,
        lambda v: 1 - STRENGTH + STRENGTH * wiener(2 * v / dense.highest - 1),
        {n: second[n] for n in filtered},
    )
    for got, of in ((step.before, second), (step.after, after)):
        energy = dense.in_bands(of)
        np.testing.assert_allclose(got, energy / energy.sum(), atol=1e-4)
    assert np.abs(step.before - step.after).max() > 0.005

    norms = {n: np.sqrt(np.sum(g**2)) for n, g in second.items()}
    rough = dense.roughness(after)
    expected = [as_table(norms, blocks, roles), as_table(rough, blocks, roles)]
    tables = step.gradient_norms, step.roughness
    for table, wanted in zip(tables, expected, strict=True):
        np.testing.assert_allclose(table, wanted, rtol=2e-3, atol=1e-5)
    assert np.isfinite(expected[1]).sum() > 20
    moved = {n: np.sum((weights[1][n] - weights[0][n]) ** 2.0) for n in filtered}
    by_block = np.sqrt(np.nansum(as_table(moved, blocks, roles), axis=1))
    np.testing.assert_allclose(step.perturbation, by_block, rtol=1e-3)

    edges = np.linspace(0, dense.highest, 33)
    counts = np.histogram(dense.values.round(9).clip(0), edges)[0]
    np.testing.assert_allclose(graph.density.share, counts / counts.sum(), atol=1e-6)
    np.testing.assert_allclose(graph.density.edges, edges, rtol=1e-6)
    edge_weights = dense.adjacency[np.triu(dense.adjacency) > 0]
    for (counts, edges), values in ((graph.degrees, dense.degree), (graph.weights, edge_weights)):
        assert (edges[0], edges[-1]) == (0, pytest.approx(values.max(), rel=1e-6))
        wanted = np.histogram(values, np.linspace(0, values.max() * (1 + 1e-9), len(edges)))[0]
        assert counts.sum() == len(values)
        assert np.abs(counts - wanted).sum() <= 2  # where one lies on an edge


def shares(seed, count=5):
    values = np.random.default_rng(seed).random(count)
    return values / values.sum()


class Kept(Board):
    """Keeps what it is told to draw and to count."""

    def __init__(self):
        super().__init__(lambda metrics: None, None, lambda: 0, is_open=True)
        self.drawn, self.counted = {}, {}

    def figure(self, name, make):
        self.drawn[name] = make()

    def histogram(self, name, counts, edges):
        self.counted[name] = counts, edges


def heights(axes):
    kinds = [c for c in axes.containers if isinstance(c, BarContainer)]
    return [np.array([bar.get_height() for bar in container]) for container in kinds]


def test_each_array_is_drawn_in_its_place():
    board = Kept()
    shown = Dashboard(board, "wiener", [2, 3], ["l.*.a", "l.*.b", "l.*.c"], 1)
    found = SignalToNoise(shares(0), shares(2), shares(3), 9)
    norms, rough = (shares(seed, 6).reshape(2, 3) for seed in (4, 5))
    acting = FilterReading(0.25, shares(8), shares(9))
    step = StepReading("update", shares(6), shares(7), acting, found, norms, rough, shares(10, 2))
    density = Density(shares(11), np.linspace(0, 3.5, 6))
    graph = GraphReading(density, (shares(12), shares(13)), (shares(14), shares(15)))
    for number in range(3):
        shown.record(10 * number, shares(20 + number))
    shown.show(step, graph)
    shown.show_graph(graph)

    drawn = board.drawn
    bars, line = drawn["density_of_states"].axes
    np.testing.assert_array_equal(heights(bars)[0], density.share)
    np.testing.assert_array_equal(line.lines[0].get_ydata(), step.filter.gains)
    assert line.get_ylabel() == "gain, wiener at strength 0.25"
    np.testing.assert_array_equal(heights(drawn["energy"].axes[0]), [step.before, step.after])
    [mesh] = drawn["energy_over_time"].axes[0].collections
    expected = np.stack([shares(20 + number) for number in range(3)])
    np.testing.assert_array_equal(mesh.get_array().reshape(5, 3), expected.T)
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [-5, 5, 15, 25])
    powers = [patch.get_data().values for patch in drawn["signal_to_noise"].axes[0].patches]
    np.testing.assert_array_equal(powers, [found.signal, found.noise])
    np.testing.assert_array_equal(heights(drawn["gains"].axes[0])[0], step.filter.adaptive)
    for table, label, name in (
        (norms, "gradient norm", "gradient_norm_by_block_and_role"),
        (
            rough,
            "share of the highest frequency",
            "roughness_of_the_filtered_update_by_block_and_role",
        ),
    ):
        axes, bar = drawn[name].axes
        np.testing.assert_array_equal(axes.collections[0].get_array().reshape(3, 2), table.T)
        assert bar.get_ylabel() == label
        assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]
    perturbed = drawn["perturbation_by_block"].axes[0]
    np.testing.assert_array_equal(heights(perturbed)[0], step.perturbation)
    assert [text.get_text() for text in perturbed.get_xticklabels()] == ["2", "3"]
    for name in ("energy", "signal_to_noise", "gains"):
        assert drawn[name].axes[-1].get_xlim() == (0, 3.5), name
    assert drawn["energy_over_time"].axes[0].get_ylim() == (0, 3.5)
    assert board.counted == {"node_degree": graph.degrees, "edge_weight": graph.weights}


def test_the_history_of_a_long_run_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(dashboard, "MOST_COLUMNS", 16)
    shown = Dashboard(Kept(), "heat", [], [], 1)
    for step in range(1000):
        energies = np.full(BANDS, np.nan) if step % 7 == 3 else np.full(BANDS, float(step + 1))
        shown.record(step, energies)
        assert len(shown._history) <= 16
    steps = np.array([step for step, _ in shown._history])
    assert len(steps) > 8
    gaps = np.diff([0, *steps, 1000])[1:]  # all parts of the run alike
    assert steps[0] == 0
    assert gaps.max() < 1000 / 8
    assert gaps[:-1].min() > gaps.max() / 2
    assert not (steps % 7 == 3).any()  # energies that are not finite
    assert all((energies == step + 1).all() for step, energies in shown._history)
    shown.record(1000, np.zeros(BANDS))  # of a graph that is not known yet
    assert shown._history[-1][0] < 1000
