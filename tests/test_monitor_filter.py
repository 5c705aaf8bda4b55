"""What the monitor tells of the filter is what acts at this step, and it keeps no old graph."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import spectral_ds

BANDS = 4

HEAT = {
    "graph": {"edges": [{"family": "ring"}], "laplacian": "normalized"},
    "filter": {"response": "heat", "tau": 1.5, "strength": 0.8, "warmup_steps": 4, "interval": 2},
    "statistics": {"interval": 1},
    "monitor": {"interval": 1, "figures_interval": 1, "bands": BANDS},
}


class Drawn:
    """A small model that trains alone, and what was given to the figures at each step."""

    def __init__(self, folder, section):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Linear(20, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.writer = SummaryWriter(str(folder))
        self.plugin = spectral_ds.attach(self.model, self.optimizer, section, writer=self.writer)
        self.facts = []
        self.plugin.monitor._dashboard.show = lambda step, graph: self.facts.append(step)

    def step(self):
        self.model(torch.randn(8, 6)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self):
        self.plugin.detach()
        self.writer.close()


def test_what_acts_at_the_current_strength_is_drawn_and_judged(tmp_path):
    run = Drawn(tmp_path, HEAT)
    # A step that is not filtered counts as the last one that was; then the warm-up is over.
    for strength in (0.2, 0.2, 0.6, 0.6, 0.8):
        run.step()
        middles = (np.arange(32) + 0.5) / 16
        expected = 1 - strength + strength * np.exp(-1.5 * middles)
        np.testing.assert_allclose(run.facts[-1].filter.gains, expected, rtol=1e-6)
        assert run.facts[-1].filter.strength == pytest.approx(strength)
    found = run.plugin.snr()
    energy = np.square(0.2 + 0.8 * np.exp(-1.5 * 2 * found.centers))
    signal, noise = np.maximum(found.signal, 0), np.maximum(found.noise, 0)
    kept = (energy @ signal) / (energy @ noise) * noise.sum() / signal.sum()
    assert abs(kept - 1) > 0.01
    got = run.plugin.metrics()["signal_to_noise/kept_over_total"]
    assert got == pytest.approx(kept, rel=1e-3)  # the response is a series within its tolerance
    run.close()


def test_a_filter_whose_strength_has_decayed_keeps_all(tmp_path):
    run = Drawn(tmp_path, {**HEAT, "filter": {**HEAT["filter"], "decay_steps": 4, "interval": 1}})
    kept = []
    for _ in range(10):
        run.step()
        kept.append(run.plugin.metrics().get("signal_to_noise/kept_over_total"))
    assert abs(kept[4] - 1) > 0.01
    assert kept[-1] == 1
    run.close()


def test_until_the_graph_is_known_no_filter_is_drawn(tmp_path):
    edges = [{"family": "similarity", "features": "gradient", "neighbours": 3}]
    run = Drawn(tmp_path, {**HEAT, "graph": {"edges": edges, "refresh_interval": 2}})
    for is_known in (False, False, True):
        run.step()
        assert (run.facts[-1].filter.gains.min() < 1) == is_known
    run.close()


def test_a_graph_that_was_rebuilt_is_not_kept(tmp_path):
    edges = [{"family": "similarity", "neighbours": 3}]
    graph = {"edges": edges, "refresh_interval": 2}
    run = Drawn(tmp_path, {**HEAT, "graph": graph, "monitor": {"interval": 2, "bands": BANDS}})
    run.step()
    first = weakref.ref(run.plugin.graph)
    run.step()
    assert first() is run.plugin.graph
    assert len(run.facts) == 1  # of that graph
    run.plugin.stack.graphs[0].build()
    gc.collect()
    assert first() is None
    run.close()
