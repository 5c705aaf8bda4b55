"""Responses, presets and schedules by their formulas, with gradients by hand on one process."""

import numpy as np
import pygsp
import pytest
import tiny
import torch
from by_hand import (
    SIMILARITY,
    Blocks,
    attached,
    check,
    filtered_by_hand,
    gradients_now,
    gradients_of,
    set_gradients,
)
from synthetic import by_dense_laplacian, smooth_bands

import spectral_ds

EXACT = {"strength": 1.0, "tolerance": 1e-6}


@pytest.mark.parametrize("kind", ["normalized", "combinatorial"])
def test_responses_equal_those_of_pygsp(kind):
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
        expected = reference.filter(gradients["0.weight"].astype(float), method="exact")
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
