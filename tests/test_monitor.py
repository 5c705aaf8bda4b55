"""Moments, band energies and metrics, against dense spectra."""

import functools

import numpy as np
import oracle
import pytest
import tiny
import torch
from cells import Training, one_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import spectral_ds
from spectral_ds.spectrum import band_energies
from spectral_ds.stack import choices

BANDS = 4


@pytest.mark.parametrize("bands", [2, 8, 64])
def test_bands_take_the_energy_of_their_frequencies(bands):
    count = 4 * bands
    for band in range(bands):
        x = -1 + (2 * band + 1) / bands  # the middle of the band
        moments = 3.0 * np.cos(np.arange(count) * np.arccos(x))
        energies = band_energies(moments, bands)
        assert energies.sum() == pytest.approx(1)
        assert (energies > -1e-12).all()
        assert energies.argmax() == band
        assert energies[max(0, band - 1) : band + 2].sum() > 0.85


def test_a_zero_signal_has_no_energy():
    assert band_energies(np.zeros(8), 4).tolist() == [0] * 4


def monitored_run(section, optimizer=torch.optim.SGD, rates=tiny.SGD_RATES, steps=1, **config):
    """Metrics before and after."""
    training = Training("zero2", section, optimizer, rates, **config)
    before = training.plugin.metrics()
    training.train(steps)
    metrics = training.plugin.metrics()
    training.close()
    return before, metrics


def adamw_run(section, steps, config=None):
    """By something that converges."""
    return monitored_run(section, torch.optim.AdamW, tiny.ADAM_RATES, steps, **(config or {}))


def plain_step():
    [facts] = one_step("zero2", [None])
    return facts


@pytest.fixture(scope="module")
def plain(ranks):
    """What a step without the plugin is made of, by the number of ranks."""
    return functools.cache(lambda world_size: ranks(world_size).run(plain_step)[0])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("kind", ["normalized", "combinatorial"])
def test_metrics_are_those_of_the_dense_spectrum(ranks, plain, world_size, kind):
    edges = [{"family": "similarity", "neighbours": 3}, {"family": "depth"}]
    section = {
        "graph": {"edges": edges, "laplacian": kind},
        "filter": {"response": "heat", "tau": 0.5, "tolerance": 1e-7, "strength": 0.9},
        "monitor": {"bands": BANDS, "interval": 1},
    }
    facts = plain(world_size)
    names = [n for n in facts["weights"] if n in facts["gradients"] and tiny.is_filtered(n)]
    weights = {n: facts["weights"][n] for n in names}
    gradients = {n: facts["gradients"][n] for n in names}
    adjacency = oracle.adjacency_of(weights, edges)
    laplacian = oracle.laplacian_of(adjacency, kind)
    lambda_max = 2.0 if kind == "normalized" else 2 * np.diag(laplacian).max()
    filtered = oracle.apply_function(laplacian, oracle.response_of(section["filter"]), gradients)

    results = ranks(world_size).run(monitored_run, section)
    for before, metrics in results:
        assert before == {}
        assert metrics == results[0][1]
        assert metrics["step"] == 0
        for signal, when in ((gradients, "before"), (filtered, "after")):
            norm = np.sqrt(sum((g**2).sum() for g in signal.values()))
            assert metrics[f"gradient_norm/{when}"] == pytest.approx(norm, rel=1e-5)
            found = [metrics[f"band_energy_{when}/{b}"] for b in range(BANDS)]
            expected = dense_energies(laplacian, lambda_max, signal)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert metrics["band_energy_after/0"] > metrics["band_energy_before/0"]
        assert metrics["nodes"] == len(adjacency)
        assert metrics["edges"] == np.count_nonzero(np.triu(adjacency))
        assert (metrics["boundary_bytes"] > 0) == (world_size > 1)
        assert metrics["filter_seconds"] > 0


def dense_energies(laplacian, lambda_max, signal):
    """Shares of the energy in equal bands, whose edges are as smooth as documented.

    Parameters without any edge are left out.
    """
    values, vectors = np.linalg.eigh(laplacian)
    first, total = oracle.numbering(signal)
    rows = {name: oracle.as_nodes(array) for name, array in signal.items()}
    is_reached = np.diag(laplacian) > 0
    rows = {n: r for n, r in rows.items() if is_reached[first[n] : first[n] + len(r)].any()}
    assert 0 < len(rows) < len(signal)
    energy = np.zeros(total)
    for width in {each.shape[1] for each in rows.values()}:
        x = np.zeros((total, width))
        for name, each in rows.items():
            if each.shape[1] == width:
                x[first[name] : first[name] + len(each)] = each
        energy += np.square(vectors.T @ x).sum(axis=1)
    edges, place = np.linspace(0, 1, BANDS + 1), 2 * values / lambda_max - 1
    gains = (oracle.step_response(edges, one, 4 * BANDS - 1)(place) for one in np.eye(BANDS))
    found = np.array([gain @ energy for gain in gains])
    return found / found.sum()


def sketched_run(section):
    """A run in which signals of more than 20 elements are wide."""
    usual, choices.LONGEST_WHOLE = choices.LONGEST_WHOLE, 20
    try:
        return monitored_run(section)
    finally:
        choices.LONGEST_WHOLE = usual


@pytest.mark.parametrize("world_size", [1, 3])
def test_wide_signals_are_measured_by_their_projections(ranks, plain, world_size):
    edges = [{"family": "similarity", "neighbours": 3}, {"family": "depth"}]
    section = {
        "graph": {"edges": edges},
        "filter": {"response": "window", "strength": 1.0},
        "monitor": {"bands": BANDS, "interval": 1},
    }
    facts = plain(world_size)
    names = [n for n in facts["weights"] if n in facts["gradients"] and tiny.is_filtered(n)]
    laplacian = oracle.laplacian_of(
        oracle.adjacency_of({n: facts["weights"][n] for n in names}, edges)
    )
    columns = {n: oracle.as_nodes(facts["gradients"][n]) for n in names}
    assert {c.shape[1] > 20 for c in columns.values()} == {True, False}
    sketches = {n: projected(c) if c.shape[1] > 20 else c for n, c in columns.items()}
    expected = dense_energies(laplacian, 2.0, sketches)
    assert np.abs(dense_energies(laplacian, 2.0, columns) - expected).max() > 1e-3
    norm = np.sqrt(sum((c**2).sum() for c in columns.values()))
    for _, metrics in ranks(world_size).run(sketched_run, section):
        found = [metrics[f"band_energy_before/{b}"] for b in range(BANDS)]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert metrics["gradient_norm/before"] == pytest.approx(norm, rel=1e-5)


def projected(rows):
    """On 16 Gaussian vectors."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(rows.shape[1], 16, dtype=torch.float64, generator=generator)
    return rows @ draw.numpy() / 4


def test_scalars_join_deepspeeds_own_in_one_event_file(ranks, tmp_path):
    section = {"monitor": {"interval": 2, "bands": BANDS}, "statistics": {"interval": 1}}
    board = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    results = ranks(2).run(adamw_run, section, 5, {"tensorboard": board})
    [folder] = [path.parent for path in tmp_path.rglob("events.out.tfevents.*")]
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {
        *(f"gradient_norm/{when}" for when in ("before", "after")),
        *(f"band_energy_{when}/{b}" for when in ("before", "after") for b in range(BANDS)),
        *("filter_seconds", "boundary_bytes", "nodes", "edges", "strength"),
    }
    assert {f"spectral_ds/{name}" for name in expected} <= tags
    own = {s.step for s in events.Scalars("Train/Samples/lr")}
    assert {s.step for s in events.Scalars("spectral_ds/nodes")} <= own
    _, metrics = results[0]
    for name in expected:
        scalars = events.Scalars(f"spectral_ds/{name}")
        assert [s.step for s in scalars] == [(step + 1) * tiny.GLOBAL_BATCH for step in (0, 2, 4)]
        assert all(np.isfinite(s.value) for s in scalars)
        assert scalars[-1].value == pytest.approx(metrics[name], rel=1e-6)
    for name in (*range(BANDS), "total", "kept_over_total"):  # from the second sample on
        scalars = events.Scalars(f"spectral_ds/signal_to_noise/{name}")
        assert [s.step for s in scalars] == [(step + 1) * tiny.GLOBAL_BATCH for step in (2, 4)]


def test_other_steps_and_runs_without_the_monitor_have_no_metrics(ranks):
    _, metrics = ranks(2).run(adamw_run, {"monitor": {"interval": 3}}, 5)[0]
    assert metrics["step"] == 3
    _, metrics = ranks(2).run(adamw_run, {"monitor": {"enabled": False}}, 1)[0]
    assert metrics == {}


class BeforeAndAfter(torch.nn.Module):
    """Parameters with names of what is measured."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "layernorm_before": torch.nn.LayerNorm(6),
                    "linear": torch.nn.Linear(6, 6),
                    "layernorm_after": torch.nn.LayerNorm(6),
                }
            )
            for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer["layernorm_after"](x + layer["linear"](layer["layernorm_before"](x)))
        return x


def idle_step():
    """Metrics of a step that filters nothing, and the norms of the gradient by role."""
    model = BeforeAndAfter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    section = {"preset": "observe", "monitor": {"interval": 1, "bands": BANDS}}
    plugin = spectral_ds.attach(model, optimizer, section)
    (model(torch.linspace(-1, 1, 30).view(5, 6)) ** 3).sum().backward()
    norms = {}
    for when in ("before", "after"):
        parts = [layer[f"layernorm_{when}"].weight.grad for layer in model.layers]
        norms[f"layers.*.layernorm_{when}.weight"] = float(torch.cat(parts).norm())
    optimizer.step()
    plugin.detach()
    return plugin.metrics(), norms


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_idle_step_keeps_the_norms_of_parameters_named_before_and_after(ranks, world_size):
    for metrics, norms in ranks(world_size).run(idle_step):
        before, after = norms.values()
        assert before != pytest.approx(after, rel=0.1)
        for role, norm in norms.items():
            assert metrics[f"gradient_norm_by_role/{role}"] == pytest.approx(norm, rel=1e-5)
        assert metrics["gradient_norm/after"] == metrics["gradient_norm/before"] > 0
        for band in range(BANDS):
            energy = metrics[f"band_energy_before/{band}"]
            assert metrics[f"band_energy_after/{band}"] == energy
