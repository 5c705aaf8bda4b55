"""Moments, band energies, metrics and the TensorBoard file, against dense spectra."""

import numpy as np
import oracle
import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import spectral_ds
from spectral_ds import stage
from spectral_ds.spectrum import band_energies

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


def monitored_run(stage, section, folder=None, steps=1):
    """Metrics before and after, and the moments that the monitor measured."""
    changes = {}
    if folder is not None:
        changes["tensorboard"] = {"enabled": True, "output_path": folder, "job_name": "run"}
    config = {**tiny.deepspeed_config(stage, **changes), "spectral_ds": section}
    # One step: SGD, as the unfiltered one; more: something that converges.
    optimizer, rates = (
        (torch.optim.SGD, tiny.SGD_RATES) if steps == 1 else (torch.optim.AdamW, tiny.ADAM_RATES)
    )
    engine = tiny.make_engine(config, optimizer, rates)
    plugin = spectral_ds.plugin_of(engine)
    moments = []
    recorded = plugin.monitor._moments

    def remember(signal, count):
        moments.append(recorded(signal, count))
        return moments[-1]

    plugin.monitor._moments = remember
    before = plugin.metrics()
    tiny.train(engine, steps)
    metrics = plugin.metrics()
    engine.destroy()
    return before, metrics, [m.numpy() for m in moments]


def plain_gradients(stage):
    return tiny.gradients_of_one_step(tiny.deepspeed_config(stage))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("kind", ["normalized", "combinatorial"])
def test_metrics_are_those_of_the_dense_spectrum(ranks, world_size, kind):
    edges = [{"family": "similarity", "neighbours": 3}, {"family": "depth"}]
    section = {
        "graph": {"edges": edges, "laplacian": kind},
        "filter": {"response": "heat", "tau": 0.5, "tolerance": 1e-7, "strength": 0.9},
        "monitor": {"bands": BANDS, "interval": 1},
    }
    plain = ranks(world_size).run(plain_gradients, 2)[0]
    names = [n for n in plain["weights"] if n in plain["gradients"] and tiny.is_filtered(n)]
    weights = {n: plain["weights"][n] for n in names}
    gradients = {n: plain["gradients"][n] for n in names}
    adjacency = oracle.adjacency_of(weights, edges)
    laplacian = oracle.laplacian_of(adjacency, kind)
    lambda_max = 2.0 if kind == "normalized" else 2 * np.diag(laplacian).max()
    filtered = oracle.apply_function(laplacian, oracle.response_of(section["filter"]), gradients)

    results = ranks(world_size).run(monitored_run, 2, section)
    for before, metrics, moments in results:
        assert before == {}
        assert metrics == results[0][1]
        assert metrics["step"] == 0
        for signal, when, got in zip(
            (gradients, filtered), ("before", "after"), moments, strict=True
        ):
            norm = np.sqrt(sum((g**2).sum() for g in signal.values()))
            assert metrics[f"gradient_norm/{when}"] == pytest.approx(norm, rel=1e-5)
            expected = dense_moments(laplacian, lambda_max, signal, 4 * BANDS)
            np.testing.assert_allclose(got, expected, atol=1e-5 * expected[0])
            energies = [metrics[f"band_energy_{when}/{b}"] for b in range(BANDS)]
            assert sum(energies) == pytest.approx(1)
        assert metrics["band_energy_after/0"] > metrics["band_energy_before/0"]
        assert metrics["nodes"] == len(adjacency)
        assert metrics["edges"] == np.count_nonzero(np.triu(adjacency))
        assert (metrics["boundary_bytes"] > 0) == (world_size > 1)
        assert metrics["filter_seconds"] > 0


def dense_moments(laplacian, lambda_max, signal, count):
    """<X, cos(j arccos(2 lambda / lambda_max - 1)) X> by eigendecomposition.

    Parameters without any edge are left out.
    """
    values, vectors = np.linalg.eigh(laplacian)
    angle = np.arccos(np.clip(2 * values / lambda_max - 1, -1, 1))
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
    return np.array([np.cos(order * angle) @ energy for order in range(count)])


def sketched_run(section):
    """A run in which signals of more than 20 elements are wide."""
    usual, stage.LONGEST_WHOLE = stage.LONGEST_WHOLE, 20
    try:
        return monitored_run(2, section)
    finally:
        stage.LONGEST_WHOLE = usual


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_wide_signals_are_measured_by_their_projections(ranks, world_size):
    edges = [{"family": "similarity", "neighbours": 3}, {"family": "depth"}]
    section = {
        "graph": {"edges": edges},
        "filter": {"response": "window", "strength": 1.0},
        "monitor": {"bands": BANDS, "interval": 1},
    }
    plain = ranks(world_size).run(plain_gradients, 2)[0]
    names = [n for n in plain["weights"] if n in plain["gradients"] and tiny.is_filtered(n)]
    laplacian = oracle.laplacian_of(
        oracle.adjacency_of({n: plain["weights"][n] for n in names}, edges)
    )
    columns = {n: oracle.as_nodes(plain["gradients"][n]) for n in names}
    assert {c.shape[1] > 20 for c in columns.values()} == {True, False}
    sketches = {n: projected(c) if c.shape[1] > 20 else c for n, c in columns.items()}
    expected = dense_moments(laplacian, 2.0, sketches, 4 * BANDS)
    norm = np.sqrt(sum((c**2).sum() for c in columns.values()))
    for _, metrics, moments in ranks(world_size).run(sketched_run, section):
        np.testing.assert_allclose(moments[0], expected, atol=1e-5 * expected[0])
        assert moments[0][0] == pytest.approx(norm**2, rel=0.2)
        assert metrics["gradient_norm/before"] == pytest.approx(norm, rel=1e-5)


def projected(rows):
    """On 16 Gaussian vectors."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(rows.shape[1], 16, dtype=torch.float64, generator=generator)
    return rows @ draw.numpy() / 4


def test_scalars_join_deepspeeds_own_in_one_event_file(ranks, tmp_path):
    section = {"monitor": {"interval": 2, "bands": BANDS}, "statistics": {"interval": 1}}
    results = ranks(2).run(monitored_run, 2, section, str(tmp_path), 5)
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
    _, metrics, _ = results[0]
    for name in expected:
        scalars = events.Scalars(f"spectral_ds/{name}")
        assert [s.step for s in scalars] == [(step + 1) * tiny.GLOBAL_BATCH for step in (0, 2, 4)]
        assert all(np.isfinite(s.value) for s in scalars)
        assert scalars[-1].value == pytest.approx(metrics[name], rel=1e-6)
    for name in (*range(BANDS), "total", "kept_over_total"):  # from the second sample on
        scalars = events.Scalars(f"spectral_ds/signal_to_noise/{name}")
        assert [s.step for s in scalars] == [(step + 1) * tiny.GLOBAL_BATCH for step in (2, 4)]


def test_other_steps_measure_nothing(ranks):
    section = {"monitor": {"interval": 3}}
    _, metrics, moments = ranks(2).run(monitored_run, 2, section, None, 5)[0]
    assert len(moments) == 4  # steps 0 and 3, before and after
    assert metrics["step"] == 3
    section = {"monitor": {"enabled": False}}
    _, metrics, moments = ranks(2).run(monitored_run, 2, section, None, 2)[0]
    assert metrics == {}
    assert moments == []
