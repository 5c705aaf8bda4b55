"""What follows gradients: adaptive gains, graphs that are rebuilt, and what they leave behind."""

import gc
import weakref

import numpy as np
import oracle
import pytest
import torch
from by_hand import (
    SIMILARITY,
    Blocks,
    Messages,
    attached,
    check,
    gradients_now,
    gradients_of,
    set_gradients,
    smooth_gradients,
)
from synthetic import by_dense_laplacian, smooth_bands


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
