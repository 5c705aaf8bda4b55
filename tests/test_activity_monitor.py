"""What is told of a graph of activations is what dense numpy finds, and each array is drawn."""

import re

import numpy as np
import pytest
import tiny
import torch
from cells import CELLS, Training
from said import messages

import spectral_ds
from spectral_ds.monitor.activity import ActivityBands

# So many directions that no layer's moments are sketched.
RANK, BANDS, TAU, STRENGTH, RATES = 12, 4, 2.0, 0.8, (64.0, 32.0)
TAGS = ("01", "02-04", "05-12", "others")
EDGE = {"family": "activations", "rank": RANK, "keep": "given"}
GRAPH = {"node": "column", "edges": [EDGE]}
SECTION = {
    "graph": GRAPH,
    "filter": {"response": "tikhonov", "tau": TAU, "strength": STRENGTH, "apply_to": "update"},
    "monitor": {"interval": 1, "figures_interval": 1, "bands": BANDS},
}


def inputs_to_keep():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 53, (4, 9), generator=generator) for _ in range(3)]


def told_of_one_step(name):
    """Metrics, what the figures were given, and what was said."""
    with messages(0) as said:
        training = Training(CELLS[name], SECTION, rates=RATES)
        training.plugin.calibrate(inputs_to_keep())
        shown, given = training.plugin.monitor._dashboard, []
        shown.board.is_open = True
        shown.show_activity = lambda step, graph: given.append((step, graph))
        training.step(0)
        found = training.plugin.metrics(), given[0], shown.blocks, shown.roles
        training.close()
    return (*found, [line for line in said if "goes along" in line])


class Dense:
    """Co-activation of the tiny model, whole, and the first update of SGD."""

    def __init__(self):
        model, self.moments = tiny.TinyLlama(), {}
        name_of = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        handles = [
            module.register_forward_pre_hook(self._seeing(name_of[id(module.weight)]))
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and id(module.weight) in name_of
        ]
        with torch.no_grad():
            for tokens in inputs_to_keep():
                model(tokens)
        for handle in handles:
            handle.remove()
        model(tiny_batch()).backward()
        rates = tiny.learning_rates(model)
        self.updates = {
            n: rates[n] * p.grad.double().numpy()
            for n, p in model.named_parameters()
            if n in self.moments and tiny.is_filtered(n)
        }

    def _seeing(self, name):
        def see(_, args):
            x = args[0].double().numpy().reshape(-1, args[0].shape[-1])
            self.moments[name] = self.moments.get(name, 0) + x.T @ x

        return see

    def eigenpairs(self, name):
        """All of A, the most active first."""
        c = self.moments[name]
        values, vectors = np.linalg.eigh(len(c) * c / np.trace(c))
        return values[::-1], vectors[:, ::-1]

    def filtered(self, name):
        """The update, the known directions exactly and all others as one."""
        values, vectors = self.eigenpairs(name)
        values = np.append(values[:RANK], np.full(len(values) - RANK, values[RANK:].mean()))
        gains = 1 - STRENGTH + STRENGTH / (1 + TAU * values)
        return self.updates[name] @ vectors * gains @ vectors.T

    def along(self, updates):
        """By name, the energy along each direction of all."""
        return {n: np.square(x @ self.eigenpairs(n)[1]).sum(axis=0) for n, x in updates.items()}


def tiny_batch():
    """All sequences of the first step."""
    generator = torch.Generator().manual_seed(100)
    return torch.randint(0, 53, (tiny.GLOBAL_BATCH, 9), generator=generator)


@pytest.fixture(scope="module")
def dense():
    return Dense()


def share(along, directions):
    found = sum(energy[:directions].sum() for energy in along.values())
    return found / sum(energy.sum() for energy in along.values())


def role_of(name):
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def as_table(along, blocks, roles):
    table = np.full((len(blocks), len(roles)), np.nan)
    for name, energy in along.items():
        block = int(re.search(r"\.(\d+)\.", name)[1])
        place = blocks.index(block), roles.index(role_of(name))
        table[place] = energy[:RANK].sum() / energy.sum()
    return table


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_shares_along_active_directions_are_those_of_dense_numpy(ranks, dense, name):
    metrics, (step, graph), blocks, roles, said = ranks(2).run(told_of_one_step, name)[0]
    before = dense.along(dense.updates)
    after = dense.along({n: dense.filtered(n) for n in dense.updates})
    total = sum(energy.sum() for energy in before.values())
    chance = sum(RANK / len(e) * e.sum() for e in before.values()) / total
    expected = {"before": share(before, RANK), "after": share(after, RANK), "by_chance": chance}
    assert expected["before"] > 1.2 * expected["after"]
    for when, value in expected.items():
        for name_ in ("active_energy", "most_active_energy"):  # fewer than 32 are known
            assert metrics[f"{name_}/{when}"] == pytest.approx(value, rel=1e-4)
    for when, along in (("before", before), ("after", after)):
        held = [share(along, k) for k in (0, 1, 4, 12, 99)]
        for tag, value in zip(TAGS, np.diff(held), strict=True):
            assert metrics[f"band_energy_{when}/{tag}"] == pytest.approx(value, abs=1e-5)
    np.testing.assert_allclose(step.along_before, as_table(before, blocks, roles), rtol=1e-4)
    np.testing.assert_allclose(step.along_after, as_table(after, blocks, roles), rtol=1e-4)
    assert np.isfinite(step.along_before).sum() == len(dense.updates) == 20
    percents = [f"{100 * expected[when]:.0f} %" for when in ("before", "by_chance", "after")]
    [line] = said
    assert [f"{value} %" for value in re.findall(r"(\d+) %", line)] == percents
    assert "of the update" in line
    assert "at strength 0.8" in line

    queries = ("q_proj", "k_proj", "v_proj")
    groups = {roles_[0]: roles_ for roles_ in graph.eigenvalues}
    path = "llama.model.layers.*.self_attn"
    assert groups[f"{path}.q_proj.weight"] == tuple(f"{path}.{x}.weight" for x in queries)
    for roles_, found in graph.eigenvalues.items():
        own = [n for n in dense.updates if role_of(n) == roles_[0]]
        values = np.median([dense.eigenpairs(n)[0][:RANK] for n in own], axis=0)
        np.testing.assert_allclose(found, values, rtol=1e-4)
    assert len(graph.eigenvalues) == 4
    gains = 1 - STRENGTH + STRENGTH / (1 + TAU * graph.frequencies)
    np.testing.assert_allclose(graph.gains, gains, rtol=1e-9)
    leading = [n for n in dense.updates if role_of(n) in groups]
    spectra = [dense.eigenpairs(n)[0] for n in leading]
    assert graph.frequencies[-1] == pytest.approx(max(v[0] for v in spectra), rel=1e-4)
    held = np.zeros(len(graph.held))
    for values in spectra:
        at = [*values[:RANK], values[RANK:].mean()]
        weights = [*values[:RANK], values[RANK:].sum()]
        at = np.clip(at, graph.edges[0], graph.edges[-1])
        held += np.histogram(at, graph.edges, weights=weights)[0]
    expected_held = held / sum(map(len, spectra))
    assert graph.held.sum() == pytest.approx(1)
    assert np.abs(graph.held - expected_held).sum() < 0.05  # one may lie on an edge


class Kept:
    """A writer that keeps what is drawn and laid out."""

    def __init__(self):
        self.figures, self.charts, self.scalars = {}, {}, {}

    def add_figure(self, tag, figure, *_, **__):
        self.figures[tag.removeprefix("spectral_ds/")] = figure

    def add_custom_scalars(self, layout):
        self.charts = layout["spectral_ds"]

    def add_scalar(self, tag, value, _):
        self.scalars[tag.removeprefix("spectral_ds/")] = value

    def add_histogram_raw(self, *_, **__):
        pass

    def flush(self):
        pass


def run_alone(section, calibrates=True, steps=1):
    """What a small language model's training tells a writer, and what was said."""
    torch.manual_seed(0)
    model = tiny.LlamaForCausalLM(tiny.llama_config())
    optimizer, writer = torch.optim.AdamW(model.parameters(), lr=1e-3), Kept()
    with messages(0) as said:
        plugin = spectral_ds.attach(model, optimizer, section, writer=writer)
        if calibrates:
            plugin.calibrate([{"input_ids": tokens} for tokens in inputs_to_keep()])
        for _ in range(steps):
            model(input_ids=tiny_batch(), labels=tiny_batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    metrics, energies = plugin.metrics(), plugin.band_energies()
    plugin.detach()
    return writer, metrics, energies, [line for line in said if "goes along" in line]


FIGURES = {
    "activity",
    "filter",
    "energy",
    "energy_over_time",
    "active_share_of_the_update_by_block_and_role",
    "active_share_of_the_filtered_update_by_block_and_role",
    "gradient_norm_by_block_and_role",
}


def test_a_run_writes_charts_and_figures_of_its_graph_alone():
    section = {**SECTION, "regularizer": {"strength": 1e-3, "coupling": "decoupled"}}
    writer, metrics, energies, said = run_alone(section, steps=2)
    assert writer.figures.keys() == {*FIGURES, "perturbation_by_block"}
    assert not [title for title in writer.charts if "frequency" in title or "noise" in title]
    of_bands = next(tags for title, tags in writer.charts.items() if "activity" in title)[1]
    assert of_bands == [f"spectral_ds/band_energy_before/{tag}" for tag in TAGS]
    [lines] = [t for title, (_, t) in writer.charts.items() if "along active" in title]
    assert {line.split("/")[-1] for line in lines} == {"before", "after", "by_chance"}
    assert energies["after"].tolist() == [metrics[f"band_energy_after/{t}"] for t in TAGS[::-1]]
    assert writer.scalars["active_energy/after"] < writer.scalars["active_energy/before"]
    assert len(said) == 1


def test_until_inputs_are_given_nothing_is_told_of_the_graph():
    writer, metrics, _, said = run_alone(SECTION, calibrates=False)
    assert writer.figures.keys() == {"gradient_norm_by_block_and_role"}
    of_the_graph = ("active_", "most_active_", "band_energy")
    assert not [name for name in [*metrics, *writer.scalars] if name.startswith(of_the_graph)]
    assert said == []


def test_a_run_that_only_looks_says_so_of_the_gradient():
    observing = {"preset": "observe", "graph": GRAPH, "monitor": SECTION["monitor"]}
    writer, metrics, _, [line] = run_alone(observing)
    assert "of the gradient" in line
    assert "after the filter" not in line
    assert metrics["active_energy/before"] == metrics["active_energy/after"]
    assert writer.figures["filter"].axes[1].lines[0].get_ydata().tolist() == [1.0] * 200


def test_the_sentence_waits_for_full_strength():
    warm = {**SECTION, "filter": {**SECTION["filter"], "warmup_steps": 3}}
    for steps, said in ((3, 0), (4, 1)):
        assert len(run_alone(warm, steps=steps)[-1]) == said


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_sentence_waits_for_a_gradient_that_is_finite():
    observing = {"preset": "observe", "graph": GRAPH, "monitor": SECTION["monitor"]}
    model = tiny.TinyLlama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with messages(0) as said:
        plugin = spectral_ds.attach(model, optimizer, observing)
        plugin.calibrate(inputs_to_keep())
        for factor in (torch.inf, 1.0):
            (model(tiny_batch()) * factor).backward()
            plugin.filter_gradients()
            assert ("active_energy/before" in plugin.metrics()) == (factor == 1)
            optimizer.zero_grad()
            optimizer.step()
    plugin.detach()
    [line] = [line for line in said if "goes along" in line]
    assert "nan" not in line


def test_the_density_is_that_of_all_graphs(dense):
    model = tiny.TinyLlama()
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), SECTION)
    plugin.calibrate(inputs_to_keep())
    density = plugin.density(4)
    values = []
    for pairs in plugin.eigenpairs(RANK):
        every = dense.eigenpairs(pairs.parameters[0])[0]
        rest = np.full(len(every) - RANK, every[RANK:].mean())
        values += [*every[:RANK], *rest]
    edges = np.linspace(0, max(values), 5)
    np.testing.assert_allclose(density.edges, edges, rtol=1e-4)
    # The largest value is the end of the last bin.
    counts = np.histogram(np.clip(values, 0, density.edges[-1]), density.edges)[0]
    np.testing.assert_allclose(density.share, counts / len(values), atol=1e-12)
    for bins in (0, 1.5):
        with pytest.raises(ValueError, match="bins = "):
            plugin.density(bins)
    with pytest.raises(ValueError, match=r"k = 1\.5"):
        plugin.eigenpairs(1.5)
    plugin.detach()


@pytest.mark.parametrize("first", ["activations", "depth"])
def test_stacked_with_a_graph_of_edges_the_first_is_shown(first):
    graphs = [GRAPH, {"edges": [{"family": "depth"}]}]
    stacked = graphs if first == "activations" else graphs[::-1]
    section = {**SECTION, "graphs": stacked}
    del section["graph"]
    writer, metrics, _, said = run_alone(section)
    shows_activity = first == "activations"
    assert ("activity" in writer.figures) == shows_activity == (len(said) == 1)
    assert ("density_of_states" in writer.figures) != shows_activity
    assert ("active_energy/before" in metrics) == shows_activity
    assert ("band_energy_before/others" in metrics) == shows_activity
    assert any("frequency" in title for title in writer.charts) != shows_activity


@pytest.mark.parametrize("rank", [1, 2, 5, 32, 64, 100])
@pytest.mark.parametrize("most", [2, 3, 4, 8, 64])
def test_bands_hold_all_known_directions_once(rank, most):
    bands = ActivityBands(rank, most)
    assert 2 <= len(bands.names) == len(bands.tags) <= most
    along = np.random.default_rng(0).random(rank)
    shares = bands.shares(along, 2 * along.sum())
    assert shares[0] == pytest.approx(0.5)
    assert shares[1:].sum() == pytest.approx(0.5)
    assert len(shares) == len(bands.names)
    if most > 2:
        assert shares[-1] == pytest.approx(along[0] / along.sum() / 2)
    held = [range(*pair) for pair in bands]
    assert [i for each in held for i in each] == list(range(rank))
    assert sorted(bands.tags) == bands.tags[::-1]
    assert bands.names[-1].startswith("1")


def test_bands_of_64_directions_double():
    names = ["others", "33–64", "17–32", "9–16", "5–8", "3–4", "2", "1"]
    assert ActivityBands(64, 8).names == names
    assert ActivityBands(64, 4).names == ["others", "9–64", "2–8", "1"]
    assert ActivityBands(8, 8).tags == ["others", "5-8", "3-4", "2", "1"]
