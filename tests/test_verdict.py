"""What the plugin says about a graph: what the estimates do, once, and not too early."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from by_hand import SIMILARITY, Blocks, Messages, attached, set_gradients, smooth_gradients
from cells import Training
from synthetic import smooth_power

import spectral_ds
from spectral_ds.monitor.verdict import ENOUGH_SAMPLES, verdict
from spectral_ds.spectrum import (
    kept_over_total,
)


@pytest.mark.parametrize(
    ("signal", "noise", "gains", "expected"),
    [
        # Kept: (4 + 0.25) / 10 of the signal, (1 + 0.5) / 7 of the noise.
        ([4, 1, 5, 0], [1, 2, 1, 3], [1, 0.5, 0, 0], "separates 42 21 1.98 what the filter keeps"),
        ([3, 3, 3, 3], [1, 1, 1, 1], [1, 1, 0, 0], "does not separate 50 50 1.00 what the filter"),
        ([6, 2, 1, 3], [5, 2, 1, 4], [1, 1, 0, 0], "barely separates 67 58 1.14 what the filter"),
        ([2, 2, 2, 6], [2, 2, 2, 1], [1, 0, 0, 0], "does not separate 17 29 0.58 what the filter"),
        # A response that amplifies: shares are of the largest gain.
        ([4, 1, 5, 0], [1, 2, 1, 3], [3, 1.5, 0, 0], "separates 42 21 1.98 what the filter keeps"),
        # Alike gains: the lowest eighth, at least one band.
        ([3, 1, 1, 1], [1, 1, 1, 3], [1, 1, 1, 1], "separates 50 17 3.00 the lowest frequencies"),
        ([2, 1] * 8, [1, 1] * 8, [0.7] * 16, "does not separate 12 12 1.00 the lowest frequencies"),
        # Signal without what is kept, nothing kept, and signal without noise.
        ([0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], "does not separate 0 25 0.00 what the filter"),
        ([0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0], "does not separate 0 0 1.00 what the filter"),
        ([1, 3, 0, 0], [0, 1, 1, 1], [0.5, 0, 0, 0], "separates 6 0 at-least-250.00 what the"),
        # Estimates below 0 count as 0.
        ([4, -1, 0, 0], [1, 1, -2, 2], [1, 0, 0, 0], "separates 100 25 4.00 what the filter"),
    ],
)
def test_the_verdict_says_what_the_estimates_do(signal, noise, gains, expected):
    powers = (np.array(each, np.float64) for each in (signal, noise, gains))
    said = verdict(*powers)
    *judgement, of_signal, of_noise, ratio = expected.split(" what ")[0].split(" the ")[0].split()
    assert said.startswith(f"this graph {' '.join(judgement)} signal from noise on this model: ")
    assert "what the filter keeps" in said if " what " in expected else "the lowest freq" in said
    assert f" {of_signal} % of the gradient's signal and {of_noise} % of its noise" in said
    assert f"ratio {ratio.replace('-', ' ')} times the total" in said


def test_kept_over_total_is_finite():
    for signal in np.array([[0, 1], [1, 0], [1, -1], [0, 0]], float):
        for noise in np.array([[0, 1], [1, 0], [1, -1], [0, 0]], float):
            for gains in np.array([[0, 0], [1, 0], [1e-9, 0], [1, 1]], float):
                assert 0 <= kept_over_total(signal, noise, gains) <= 1000


@pytest.mark.parametrize("follows", [False, True])
def test_the_verdict_of_chance_is_that_it_is_too_early(follows):
    signal, noise = np.array([2.0, 0, 0, 2]), np.ones(4)
    gains = np.ones(4) if follows else np.array([1.0, 0, 0, 0])
    # 2 − 1/4 · 4 is beyond chance; its standard error is e · √((3/4)² + 3 · (1/4)²).
    error = 1 / np.sqrt(0.75)
    for share, is_told in ((0.24, True), (0.26, False)):
        said = verdict(signal, noise, gains, share * error * np.ones(4))
        assert ("this graph separates" in said) == is_told
        assert ("too noisy" in said) != is_told


@pytest.mark.parametrize(("signal", "noise"), [([0, -1], [1, 1]), ([1, 1], [0, -1])])
def test_the_verdict_waits_where_there_is_no_signal_or_no_noise(signal, noise):
    said = verdict(np.array(signal), np.array(noise), np.array([1.0, 0.0]))
    assert said == "the gradient is too noisy to tell signal from noise on this graph yet"


def verdicts_of_a_run():
    """How many were said after each step, what, and what the plugin knew at the first."""
    section = {
        "graph": {"include": ["*.mlp.gate_proj.*"]},
        # Keeps high frequencies: that this separates nothing needs no significance.
        "filter": {"response": "polynomial", "coefficients": [0.0, 0.5]},
        "monitor": {"interval": 1},
        "statistics": {"interval": 1},
    }
    with Messages() as messages:
        training = Training("zero2", section, rates=(0.5, 0.25))
        said = []
        for index in range(ENOUGH_SAMPLES + 3):
            training.step(index)
            said.append(len(messages.verdicts))
            if index == ENOUGH_SAMPLES - 1:
                snr, metrics = training.plugin.snr(), training.plugin.metrics()
        training.close()
    return dist.get_rank(), said, messages.verdicts, vars(snr), metrics


def test_the_verdict_is_given_once_on_rank_0_after_enough_samples(ranks):
    for rank, said, verdicts, snr, metrics in ranks(2).run(verdicts_of_a_run):
        assert snr["samples"] == ENOUGH_SAMPLES
        signal, noise = np.maximum(snr["signal"], 0), np.maximum(snr["noise"], 0)
        energy = np.square((np.arange(8) + 0.5) / 8)  # λ / 2 on [0, 2], squared
        ratio = (energy @ signal) / (energy @ noise) * noise.sum() / signal.sum()
        # The sentence judges the response; the metric what acts, at strength 0.5.
        acting = np.square(0.5 + 0.5 * (np.arange(8) + 0.5) / 8)
        kept = (acting @ signal) / (acting @ noise) * noise.sum() / signal.sum()
        assert abs(kept - ratio) > 0.01
        assert metrics["signal_to_noise/kept_over_total"] == pytest.approx(kept)
        assert metrics["signal_to_noise/total"] == pytest.approx(
            snr["signal"].sum() / snr["noise"].sum()
        )
        for band in range(8):
            expected = signal[band] / noise[band] if noise[band] > 0 else 0
            assert metrics[f"signal_to_noise/{band}"] == pytest.approx(expected)
        if rank == 0:
            assert said == [0] * (ENOUGH_SAMPLES - 1) + [1] * 4
            [text] = verdicts
            kept = [100 * (energy @ power) / power.sum() for power in (signal, noise)]
            assert f"{kept[0]:.0f} % of the gradient's signal and {kept[1]:.0f} %" in text
            assert f"ratio {ratio:.2f} times" in text
        else:
            assert verdicts == []


BY_GRADIENT = {
    "graph": {
        "edges": [{"family": "similarity", "features": "gradient"}],
        "refresh_interval": 30,
    },
    "statistics": {"interval": 1, "decay": 0.98},
    "filter": {"response": "identity"},
    "monitor": {"interval": 1, "figures_interval": 10**6},
}


class White:
    """Gradients of a few matrices, white signal and white noise, and what the plugin says."""

    SHAPE, BLOCKS = (192, 160), 3

    def __init__(self, section, scale, steps, seed=1):
        rows, width = self.SHAPE
        layers = (torch.nn.Linear(width, rows, bias=False) for _ in range(self.BLOCKS))
        model = torch.nn.Sequential(*layers)
        generator = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randn(self.SHAPE, generator=generator)  # noqa: E731
        self.signal = {name: scale * draw() for name, _ in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with Messages() as messages:
            plugin = spectral_ds.attach(model, optimizer, section)
            self.said = []
            for _ in range(steps):
                for name, weight in model.named_parameters():
                    weight.grad = self.signal[name] + draw()
                optimizer.step()
                self.said.append(len(messages.verdicts))
            self.snr, self.graph, self.metrics = plugin.snr(), plugin.graph, plugin.metrics()
            plugin.detach()
        self.verdicts = messages.verdicts

    def exact(self):
        """Signal and noise by the dense spectrum of the graph in use, at full width."""
        edges = np.linspace(0, 1, len(self.snr.centers) + 1)
        signal, noise = 0, 0
        for name, values in self.signal.items():
            eigenvalues, vectors = np.linalg.eigh(self.graph.laplacian([name]).toarray())
            transformed = vectors.T @ values.double().numpy()
            signal = signal + smooth_power(self.graph, edges, transformed, eigenvalues)
            spread = np.ones(self.SHAPE)
            noise = noise + smooth_power(self.graph, edges, spread, eigenvalues)
        return signal, noise


@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_signal_on_a_graph_of_gradients_looks_no_smoother_than_it_is(scale):
    run = White(BY_GRADIENT, scale, steps=59)  # the 29 since the graph was built tell
    signal, noise = run.exact()
    np.testing.assert_allclose(run.snr.noise, noise, atol=0.05 * noise.max())
    np.testing.assert_allclose(run.snr.signal, signal, atol=0.15 * signal.max())
    low = np.arange(8) < 2
    expected = kept_over_total(signal, noise, low)
    assert 1.3 < expected < 2  # it does not look white: edges join what is alike
    assert kept_over_total(run.snr.signal, run.snr.noise, low) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("response", "seed"),
    [*(("identity", seed) for seed in range(4)), ("heat", 4), ("wiener", 5), ("whiten", 6)],
)
def test_noise_on_a_graph_of_gradients_is_not_said_to_be_separated(response, seed):
    run = White({**BY_GRADIENT, "filter": {"response": response}}, 0.0, steps=70, seed=seed)
    assert len(run.verdicts) >= 1
    assert all("does not separate" in said or "too noisy" in said for said in run.verdicts)
    # "Too noisy" is said once at most, and something else once at most.
    assert len(run.verdicts) == len({"too noisy" in said for said in run.verdicts})


@pytest.mark.parametrize("features", ["gradient", "weights"])
def test_the_verdict_comes_though_no_graph_lives_for_enough_samples(features):
    graph = {"edges": [{"family": "similarity", "features": features}], "refresh_interval": 5}
    section = {**BY_GRADIENT, "graph": graph, "filter": {"response": "heat"}}
    run = White(section, 1.0, steps=12)
    # The first graph of gradients has no edges.
    after = 10 if features == "gradient" else 5
    assert run.said == [0] * after + [1] * (12 - after)


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
