"""Sketches, and signal and noise by band: against dense spectra and known distributions."""

import numpy as np
import pytest
import torch
from synthetic import GRAPHS, Sharded, random_arrays, sketch_of, smooth_bands, smooth_power

from spectral_ds.checkpoint import SavedState
from spectral_ds.filters import (
    wiener_gains,
)
from spectral_ds.graph import Ring, Similarity
from spectral_ds.sketches import Sketches

SKETCHED = random_arrays({"a": (7, 13), "b": (11, 13), "c": (13, 5), "d": (4, 3, 5), "e": (9,)})


def sketches_of(kind, alone=False):
    sharded = Sharded(SKETCHED, [Ring()], kind, alone=alone)
    sketches = Sketches(sharded.parameters, sharded.layout, 6, 0, sharded.communicator)
    sketches.take([part * torch.nan for part in sharded.local(SKETCHED)])  # is forgotten
    partial = sketches.take(sharded.local(SKETCHED))
    complete = [part.numpy() for part in sketches.complete(partial)]
    equal = sharded.parameters[: 2 if kind == "row" else 1]
    features = sketches.features(partial, equal).numpy()
    assert not sketches.take([None] * len(sharded.layout.own)).any()
    sizes = {p.name: p.nodes * sketches.columns[p.name] for p in sharded.parameters}
    sketches.layout.check(sizes)
    return list(zip(sketches.layout.own, complete, strict=True)), features


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("kind", ["row", "column"])
def test_sketches_are_projections_of_the_whole_gradient(ranks, kind, world_size):
    results = [sketches_of(kind, True)]
    if world_size > 1:
        results = ranks(world_size).run(sketches_of, kind)
    expected = {name: sketch_of(array, kind, 6) for name, array in SKETCHED.items()}
    for complete, features in results:
        equal = ("a", "b") if kind == "row" else ("a",)
        np.testing.assert_allclose(
            features, np.concatenate([expected[n] for n in equal]), atol=1e-5
        )
        for fragment, values in complete:
            columns = expected[fragment.parameter].shape[1]
            assert fragment.start % columns == fragment.length % columns == 0
            whole = expected[fragment.parameter].reshape(-1)
            np.testing.assert_allclose(values, whole[fragment.start : fragment.end], atol=1e-5)


BANDS, DECAY, SKETCH = 4, 0.8, 4


def samples_of(name, count=5):
    shapes = {parameter: array.shape for parameter, array in GRAPHS[name][0].items()}
    mean = random_arrays(shapes, 100)
    return [
        {n: mean[n] + g for n, g in random_arrays(shapes, 101 + seed).items()}
        for seed in range(count)
    ]


def observed(name, scale=1.0, bad=(), alone=False):
    """Power, signal and noise after all samples; every entry of `bad` spoils one on a rank."""
    sharded = Sharded(*GRAPHS[name], alone=alone)
    statistics = sharded.statistics(SKETCH, BANDS, DECAY)
    statistics.compare_consecutive()
    for index, sample in enumerate(samples_of(name)):
        for position, value in bad:
            if position == index:
                spoilt = [value * g for g in sharded.local(sample)]
                if sharded.communicator.rank == sharded.communicator.world_size - 1:
                    spoilt[0][0] = torch.nan if value == 1 else torch.inf
                statistics.observe(spoilt, scale)
        gradients = [scale * gradient for gradient in sharded.local(sample)]
        statistics.observe(gradients, scale)
    mean = statistics.running.mean
    features = statistics.sketches.features(mean, sharded.parameters[:1]).numpy()
    found = *statistics.estimate, statistics.consecutive.means
    return statistics.power.numpy(), *(p.numpy() for p in found), features


def weights_of(count):
    weight = DECAY ** np.arange(count)[::-1]
    return weight / weight.sum()


def dense_statistics(name, bad=()):
    """The same by numpy: means with weights DECAY^age, eigenvectors of the dense L."""
    arrays, _, kind, _ = GRAPHS[name]
    graph = Sharded(*GRAPHS[name], alone=True).graph
    samples = samples_of(name)
    weight = weights_of(len(samples))

    def power(sketches):
        total = np.zeros(BANDS)
        for columns in {sketch.shape[1] for sketch in sketches.values()}:
            names = [n for n, sketch in sketches.items() if sketch.shape[1] == columns]
            values, vectors = np.linalg.eigh(graph.laplacian(names).toarray())
            transformed = vectors.T @ np.concatenate([sketches[n] for n in names])
            gains = smooth_bands(np.linspace(0, 1, BANDS + 1), 4 * BANDS, values / graph.lambda_max)
            total += gains @ np.square(transformed).sum(axis=1)
        return total

    sketched = [{n: sketch_of(g, kind, SKETCH) for n, g in s.items()} for s in samples]
    mean = {n: sum(w * s[n] for w, s in zip(weight, sketched, strict=True)) for n in arrays}
    total = sum(w * power(s) for w, s in zip(weight, sketched, strict=True))
    noise = (total - power(mean)) / (1 - np.square(weight).sum())
    flat = [np.concatenate([sketch.ravel() for sketch in s.values()]) for s in sketched]
    broken = {position for position, _ in bad}
    pairs = [(flat[i - 1], flat[i]) for i in range(1, len(flat)) if i not in broken]
    consecutive = [len(pairs)] + [
        weights_of(len(pairs)) @ [each(*pair) for pair in pairs]
        for each in (np.dot, lambda before, now: np.square(now - before).sum() / 2)
    ]
    return total, total - noise, noise, np.array(consecutive), mean[next(iter(arrays))]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", ["similarity", "columns", "depth"])
def test_statistics_are_those_of_the_dense_spectrum(ranks, name, world_size):
    runs = {
        "usual": (),
        "scaled": (2.0**12,),
        "some not finite": (1.0, ((0, 1.0), (2, 1e30), (4, 1.0))),
    }
    for arguments in runs.values():
        expected = dense_statistics(name, *arguments[1:])
        results = [observed(name, *arguments, alone=True)]
        if world_size > 1:
            results = ranks(world_size).run(observed, name, *arguments)
        for result in results:
            for got, wanted in zip(result, expected, strict=True):
                np.testing.assert_allclose(got, wanted, atol=1e-5 * expected[0].sum())


class Stream:
    """Gradients whose signal and noise in each frequency are known."""

    def __init__(self, width):
        arrays = random_arrays({"w": (40, width)}, 7)
        self.sharded = Sharded(arrays, [Similarity(4)], alone=True)
        self.graph = self.sharded.graph
        self.values, self.vectors = np.linalg.eigh(self.graph.laplacian().toarray())
        self.generator = np.random.default_rng(8)
        share = self.values / 2
        self.mean = np.exp(-3 * share)[:, None] * self.generator.standard_normal((40, width))
        self.deviation = 0.2 + share
        edges = np.linspace(0, 1, BANDS + 1)
        self.signal = smooth_power(self.graph, edges, self.mean, self.values)
        spread = np.repeat(self.deviation[:, None], width, axis=1)
        self.noise = smooth_power(self.graph, edges, spread, self.values)

    def sample(self):
        noise = self.deviation[:, None] * self.generator.standard_normal(self.mean.shape)
        return self.sharded.local({"w": self.vectors @ (self.mean + noise)})


def test_estimates_of_signal_and_noise_are_unbiased():
    stream = Stream(6)
    found = []
    for _ in range(150):
        statistics = stream.sharded.statistics(0, BANDS, DECAY)
        for _ in range(4):
            statistics.observe(stream.sample(), 1.0)
        found.append([power.numpy() for power in statistics.estimate])
    estimates = np.array(found)
    standard_error = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert (standard_error < 0.05 * np.array([stream.signal, stream.noise]).max(axis=0)).all()
    difference = estimates.mean(axis=0) - [stream.signal, stream.noise]
    assert (np.abs(difference) <= 4 * standard_error).all()
    # Without the correction for the noise that is left in the mean, signal would be this much off.
    weight = DECAY ** np.arange(4) / (DECAY ** np.arange(4)).sum()
    assert (np.square(weight).sum() * stream.noise > 8 * standard_error[0])[1:].all()


def test_drift_over_the_window_is_no_noise_to_consecutive_samples():
    one, other = np.linalg.qr(np.random.default_rng(0).standard_normal((300, 2)))[0].T
    generator = np.random.default_rng(1)
    turn, deviation = 2 * np.pi / 80, np.sqrt(2 / 300)  # signal 1, noise 2
    arrays = {"w": one.reshape(50, 6)}
    sharded = Sharded(arrays, [Ring()], alone=True)
    statistics = sharded.statistics(0, BANDS, decay=0.99)
    statistics.compare_consecutive()
    for step in range(400):
        mean = np.cos(turn * step) * one + np.sin(turn * step) * other
        sample = mean + deviation * generator.standard_normal(300)
        statistics.observe(sharded.local({"w": sample.reshape(50, 6)}), 1.0)
    _, signal, noise = statistics.consecutive.means.tolist()
    assert signal == pytest.approx(np.cos(turn), rel=0.03)
    assert noise == pytest.approx(2 + 1 - np.cos(turn), rel=0.03)
    # To running means, what has turned by a whole circle is all noise.
    window = statistics.signal_to_noise()
    assert window.signal.sum() < 0.1
    assert window.noise.sum() > 2.9


def saved(part):
    return SavedState("a state", (), part.numbers, (), lambda kind, wanted: [])


def test_saved_means_of_consecutive_samples_go_on_but_for_the_pair_between():
    stream = Stream(6)
    samples = [stream.sample() for _ in range(6)]
    before, after = (stream.sharded.statistics(0, BANDS, DECAY) for _ in range(2))
    for statistics in (before, after):
        statistics.compare_consecutive()
    for sample in samples[:4]:
        before.observe(sample, 1.0)
    after.restore("s", saved(before.state("s")))()
    for sample in samples[4:]:
        after.observe(sample, 1.0)
    flat = [torch.cat(sample).double().numpy() for sample in samples]
    common = [flat[i - 1] @ flat[i] for i in (1, 2, 3, 5)]
    pairs, signal, _ = after.consecutive.means.tolist()
    assert pairs == 4
    assert signal == pytest.approx(weights_of(4) @ common, rel=1e-5)

    older = after.state("s")
    del older.numbers["s.consecutive"]
    before.restore("s", saved(older))()
    assert before.consecutive.means[0] == 3


def test_saved_powers_by_other_bands_count_as_no_samples_on_the_graph():
    stream = Stream(6)
    before = stream.sharded.statistics(0, BANDS, DECAY)
    for _ in range(3):
        before.observe(stream.sample(), 1.0)
    for bands, on_graph in ((BANDS, 3), (2 * BANDS, 0)):
        after = stream.sharded.statistics(0, bands, DECAY)
        after.restore("s", saved(before.state("s")))()
        assert (after.samples, after.samples_on_graph) == (3, on_graph)
        assert int(after.state("s").numbers["s.measured"]) == on_graph


def test_wiener_gains_come_close_to_the_ideal():
    stream = Stream(50)
    statistics = stream.sharded.statistics(0, BANDS, 0.9995)
    assert wiener_gains(statistics.estimate).tolist() == [1] * BANDS
    statistics.observe(stream.sample(), 1.0)
    assert wiener_gains(statistics.estimate).tolist() == [1] * BANDS
    for _ in range(600):  # in the highest band, signal is 1 % of noise
        statistics.observe(stream.sample(), 1.0)
    ideal = stream.signal / (stream.signal + stream.noise)
    assert ideal.max() - ideal.min() > 0.5
    np.testing.assert_allclose(wiener_gains(statistics.estimate).numpy(), ideal, rtol=0.05)
    found = statistics.signal_to_noise()
    assert found.samples == 601
    np.testing.assert_allclose(found.centers, [1 / 8, 3 / 8, 5 / 8, 7 / 8])
    np.testing.assert_allclose(found.signal, stream.signal, rtol=0.05)
    np.testing.assert_allclose(found.noise, stream.noise, rtol=0.05)
    np.testing.assert_allclose(found.ratio, stream.signal / stream.noise, rtol=0.05)


def test_another_graph_forgets_the_powers_by_the_old_one_but_not_the_mean_unless_made_of_it():
    stream = Stream(6)
    samples = [stream.sample() for _ in range(4)]
    statistics = stream.sharded.statistics(0, BANDS, DECAY)
    for sample in samples[:3]:
        statistics.observe(sample, 1.0)
    mean = statistics.running.mean.clone()

    other = Sharded({"w": stream.vectors[:, :6]}, [Ring()], alone=True)
    fresh = other.statistics(0, BANDS, DECAY)
    statistics.use_graph(fresh._spectrometer)
    assert not torch.cat([*statistics.estimate, statistics.power]).any()
    torch.testing.assert_close(statistics.running.mean, mean)
    statistics.observe([gradient * torch.nan for gradient in samples[0]], 1.0)
    assert not torch.cat([*statistics.estimate, statistics.power]).any()

    fresh.observe(samples[3], 1.0)
    statistics.observe(samples[3], 1.0)
    torch.testing.assert_close(statistics.power, fresh.power)
    weight = DECAY ** np.arange(4)[::-1] / (DECAY ** np.arange(4)).sum()
    parts = [
        sum(w * each for w, each in zip(weight.tolist(), runs, strict=True))
        for runs in zip(*samples, strict=True)
    ]
    left = other.statistics(0, BANDS, DECAY)
    left.observe(parts, 1.0)
    torch.testing.assert_close(statistics.running.mean, left.running.mean)
    noise = (fresh.power - left.power) / (1 - np.square(weight).sum())
    torch.testing.assert_close(statistics.estimate.noise, noise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        statistics.estimate.signal, fresh.power - noise, rtol=1e-5, atol=1e-6
    )

    made_of_it = stream.sharded.statistics(0, BANDS, DECAY, keeps_mean=False)
    for sample in samples[:2]:
        made_of_it.observe(sample, 1.0)
    only, other = other.statistics(0, BANDS, DECAY), other
    made_of_it.use_graph(only._spectrometer)
    for sample in samples[2:]:
        only.observe(sample, 1.0)
        made_of_it.observe(sample, 1.0)
    assert (made_of_it.samples, made_of_it.samples_on_graph) == (4, 2)
    for got, wanted in zip(made_of_it.estimate, only.estimate, strict=True):
        torch.testing.assert_close(got, wanted)
