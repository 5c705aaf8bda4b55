"""What is trained changes after the plugin was attached, or is not what was looked at: it is
filtered by the right graph from the next step on, or named once. In one process."""

import logging

import changing
import numpy as np
import oracle
import pytest
import torch
from changing import (
    Blocks,
    as_arrays,
    assert_is,
    filtered,
    filtered_on,
    frozen,
    sgd,
    step_of,
)

import spectral_ds

SECTION = {**changing.SECTION, "monitor": {"enabled": False}, "operator": {"kernel": "best"}}
INPUTS = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))


def gradients_of(model):
    """Of what is trained, by name."""
    model.zero_grad()
    model(INPUTS).square().sum().backward()
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


# Parameters that come to be trained


def unfreezes(model, optimizer):
    model.layers[2].requires_grad_(True)


def adds_a_group(model, optimizer):
    model.layers[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.layers[2].parameters()), "lr": 1.0})


def replaces_a_layer(model, optimizer):
    torch.manual_seed(7)
    model.layers[2] = torch.nn.Linear(6, 6)
    optimizer.add_param_group({"params": list(model.layers[2].parameters())})


CHANGES = {unfreezes: True, adds_a_group: False, replaces_a_layer: False}


@pytest.mark.parametrize("change", CHANGES)
def test_what_comes_to_be_trained_joins_at_the_next_step(change, said):
    model = frozen(Blocks(), 2)
    first = [p for p in model.parameters() if CHANGES[change] or p.requires_grad]
    optimizer = sgd(first)
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    wanted = filtered(model, gradients_of(model))
    assert_is(step_of(model, optimizer), wanted)
    nodes, count = plugin.graph.num_nodes, len(said(logging.INFO))
    change(model, optimizer)
    for _ in range(2):
        gradients = gradients_of(model)
        assert len(gradients) == 6
        if plugin.graph.num_nodes == nodes:  # built anew in this step, of these weights
            built = as_arrays(model, gradients)
        wanted = filtered_on(built, gradients)
        assert_is(step_of(model, optimizer), wanted)
    assert plugin.graph.num_nodes == nodes + 7
    [message] = said(logging.INFO)[count:]
    assert "trained from step 1 on: layers.2.weight, layers.2.bias" in message
    assert said() == []


def test_what_is_kept_when_parameters_join():
    """Step, reference and running mean of what was there; the new one begins with its own."""
    section = {
        **SECTION,
        "filter": {**SECTION["filter"], "temporal": {"decay": 0.9, "amplify": 2.0}},
        "regularizer": {"strength": 0.3, "ridge": 1.0, "coupling": "decoupled"},
    }
    model = frozen(Blocks(), 2)
    optimizer = sgd(model.parameters())
    plugin = spectral_ds.attach(model, optimizer, section)
    reference = as_arrays(model, dict(model.named_parameters()))
    means = {}
    for number in range(3):
        if number == 1:
            model.layers[2].requires_grad_(True)
            with torch.no_grad():
                model.layers[2].weight += 0.1
            reference |= as_arrays(model, [n for n in reference if "layers.2" in n])
        gradients = gradients_of(model)
        if number < 2:
            built = as_arrays(model, gradients)  # the graph is of the weights at its making
        smooth = filtered_on(built, gradients)
        for name, value in smooth.items():
            means[name] = 0.9 * means[name] + 0.1 * value if name in means else value
        before = as_arrays(model, gradients)
        step = step_of(model, optimizer)
        adjacency = oracle.adjacency_of(built, section["graph"]["edges"])
        moved = {n: before[n] - (smooth[n] + 2 * means[n]) - reference[n] for n in built}
        pull = oracle.apply_function(oracle.laplacian_of(adjacency), lambda v: v + 1, moved)
        assert_is(step, {n: smooth[n] + 2 * means[n] + 0.3 * pull[n] for n in built})
    assert plugin.engine.step == 3


def test_filtered_updates_and_metrics_go_on_when_parameters_join(tmp_path):
    section = {
        **SECTION,
        "filter": {**SECTION["filter"], "apply_to": "update"},
        "monitor": {"interval": 1, "folder": str(tmp_path), "figures_interval": 1},
    }
    model = frozen(Blocks(), 2)
    optimizer = sgd(model.parameters())
    plugin = spectral_ds.attach(model, optimizer, section)
    for number in range(3):
        if number == 1:
            unfreezes(model, optimizer)
        gradients = gradients_of(model)
        if number < 2:
            built = as_arrays(model, gradients)
        assert_is(step_of(model, optimizer), filtered_on(built, gradients))
        norm = np.sqrt(sum((value**2).sum() for value in gradients.values()))
        np.testing.assert_allclose(plugin.metrics()["gradient_norm/all"], norm, rtol=1e-5)
        assert plugin.metrics()["nodes"] == len(gradients) // 2 * 7
    state = plugin.state_dict()
    plugin.load_state_dict(state)
    plugin.detach()


def test_what_joins_between_filtering_and_the_step_does_not_stop_it():
    model = frozen(Blocks(), 2)
    optimizer = sgd(model.parameters())
    section = {**SECTION, "filter": {**SECTION["filter"], "apply_to": "update"}}
    plugin = spectral_ds.attach(model, optimizer, section)
    gradients_of(model)
    plugin.filter_gradients()
    unfreezes(model, optimizer)
    gradients = gradients_of(model)
    for parameter in model.layers[1].parameters():  # not used in this step: stays as it is
        parameter.grad = None
    used = {n: np.zeros_like(g) if "layers.1" in n else g for n, g in gradients.items()}
    wanted = filtered_on(as_arrays(model, gradients), used)
    assert_is(step_of(model, optimizer), {n: w for n, w in wanted.items() if "layers.1" not in n})


def test_updates_are_filtered_from_the_step_in_which_a_graph_of_gradients_is_known():
    """At learning rate 0 there are none: nothing else may move a weight."""
    section = {
        "graph": {
            "edges": [{"family": "similarity", "features": "gradient", "neighbours": 3}],
            "refresh_interval": 2,
        },
        "filter": {"apply_to": "update"},
        "statistics": {"interval": 1},
        "monitor": {"enabled": False},
    }
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plugin = spectral_ds.attach(model, optimizer, section)
    for _ in range(5):
        gradients_of(model)
        assert not any(value.any() for value in step_of(model, optimizer).values())
    assert plugin.graph.num_edges > 0


def test_a_graph_of_gradients_keeps_what_it_has_sampled(said):
    section = {
        "graph": {
            "edges": [{"family": "similarity", "features": "gradient", "neighbours": 3}],
            "refresh_interval": 2,
        },
        "filter": SECTION["filter"],
        "statistics": {"interval": 1},
        "monitor": {"enabled": False},
    }
    model = frozen(Blocks(), 2)
    optimizer = sgd(model.parameters())
    plugin = spectral_ds.attach(model, optimizer, section)
    for _ in range(3):
        gradients_of(model)
        optimizer.step()
    edges = plugin.graph.num_edges
    assert edges > 0
    unfreezes(model, optimizer)
    gradients_of(model)
    optimizer.step()
    assert plugin.graph.num_nodes == 21
    assert plugin.graph.num_edges >= edges  # also without a mean of the new one
    for _ in range(2):
        gradients_of(model)
        optimizer.step()
    assert plugin.graph.num_edges > edges
    assert said() == []


def test_an_adapter_that_is_switched_on_is_filtered_and_the_other_waits(said):
    import peft

    def config():
        return peft.LoraConfig(target_modules=[f"layers.{i}" for i in range(3)], r=2, lora_alpha=2)

    model = peft.get_peft_model(Blocks(), config(), adapter_name="first")
    model.add_adapter("second", config())
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    optimizer = sgd([p for n, p in model.named_parameters() if "lora" in n])
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    names: set[str] = set()
    for number, adapter in enumerate(("first", "second", "first")):
        model.set_adapter(adapter)
        gradients = gradients_of(model)
        assert all(adapter in name for name in gradients)
        names |= set(gradients)
        if number < 2:  # a graph of both, that stays
            built = as_arrays(model, names)
        both = {n: gradients.get(n, np.zeros_like(built[n])) for n in built}
        wanted = filtered_on(built, both)
        wanted |= {n: np.zeros_like(v) for n, v in wanted.items() if n not in gradients}
        assert_is(step_of(model, optimizer), wanted)
        assert len(plugin.engine.shapes) == (6 if number == 0 else 12)
    assert said() == []


def test_what_has_left_and_comes_back_is_filtered_again(said):
    """Two of three layers are trained at a time."""
    model = Blocks()
    optimizer = sgd([*model.layers[0].parameters(), *model.layers[1].parameters()])
    spectral_ds.attach(model, optimizer, SECTION)
    for layers in ((0, 1), (1, 2), (0, 1)):
        trained = [model.layers[index] for index in layers]
        optimizer.param_groups[0]["params"] = [p for each in trained for p in each.parameters()]
        gradients = gradients_of(model)
        own = {n: g for n, g in gradients.items() if int(n.split(".")[1]) in layers}
        wanted = filtered(model, own)
        assert_is(step_of(model, optimizer), wanted)
    assert said() == []


# Parameters that cannot join are named once


def test_parameters_outside_of_the_module_are_named_once(said):
    model, temperature = Blocks(1), torch.nn.Parameter(torch.ones(3))
    optimizer = sgd([*model.parameters(), temperature])
    spectral_ds.attach(model, optimizer, SECTION)
    for _ in range(2):
        temperature.grad = torch.ones(3)
        gradients_of(model)
        optimizer.step()
    [message] = said()
    assert "not filtered: one of shape (3,) outside of Blocks" in message


def test_a_frozen_parameter_with_a_gradient_is_named_and_joins_when_it_is_unfrozen(said):
    model = frozen(Blocks(), 2)
    optimizer = sgd(model.parameters())
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    for _ in range(2):
        gradients_of(model)
        model.layers[2].bias.grad = torch.ones(6)
        optimizer.step()
    [message] = said()
    assert "not filtered: layers.2.bias: frozen" in message
    unfreezes(model, optimizer)
    gradients_of(model)
    optimizer.step()
    assert "layers.2.bias" in plugin.engine.shapes


def test_what_no_graph_can_hold_is_named_and_training_goes_on(said):
    """A channels-last layer has no flat view."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 4, 3))
    optimizer = sgd(model[0].parameters())
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    model[1] = model[1].to(memory_format=torch.channels_last)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(1, 2, 6, 6)).square().sum().backward()
        optimizer.step()
    [message] = said()
    assert "not filtered: 1.weight" in message
    assert "contiguous" in message
    assert list(plugin.engine.shapes) == ["0.weight", "0.bias", "1.bias"]


def test_what_the_configuration_excludes_is_said_to_be_excluded(said):
    section = {**SECTION, "graph": {**SECTION["graph"], "exclude": ["*.weight"]}}
    model = frozen(Blocks(), 1)
    optimizer = sgd(model.parameters())
    spectral_ds.attach(model, optimizer, section)
    model.layers[1].requires_grad_(True)
    gradients = gradients_of(model)
    biases = {n: g for n, g in gradients.items() if "bias" in n}
    assert_is(step_of(model, optimizer), gradients | filtered(Blocks(), biases))
    assert "excluded by the configuration: layers.1.weight)" in said(logging.INFO)[-1]


def is_removed(model, optimizer):
    model.layers = model.layers[:2]
    optimizer.param_groups[0]["params"] = list(model.parameters())


def is_frozen(model, optimizer):
    model.layers[2].requires_grad_(False)


@pytest.mark.parametrize("change", [is_removed, is_frozen])
def test_what_is_trained_no_longer_is_not_pulled(change):
    """What has left module and optimizer has no learning rate; what is frozen stays as it is."""
    section = {**SECTION, "regularizer": {"strength": 0.3, "coupling": "decoupled"}}
    model = Blocks()
    optimizer = sgd(model.parameters())
    spectral_ds.attach(model, optimizer, section)
    old = model.layers[2]
    gradients_of(model)
    optimizer.step()
    change(model, optimizer)
    before = [p.detach().clone() for p in old.parameters()]
    gradients_of(model)
    optimizer.step()
    for was, now in zip(before, old.parameters(), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_what_has_left_the_optimizer_counts_as_zeros_though_it_has_a_gradient(apply_to):
    model = Blocks()
    optimizer = sgd(model.parameters())
    built = Blocks()
    section = {**SECTION, "filter": {**SECTION["filter"], "apply_to": apply_to}}
    spectral_ds.attach(model, optimizer, section)
    optimizer.param_groups[0]["params"] = list(model.layers[:2].parameters())
    gradients = gradients_of(model)
    left = {n: g for n, g in gradients.items() if n.startswith("layers.2")}
    assert len(left) == 2
    assert all(np.abs(gradient).max() > 0.1 for gradient in left.values())
    zeros = {n: np.zeros_like(gradient) for n, gradient in left.items()}
    assert_is(step_of(model, optimizer), filtered(built, gradients | zeros) | zeros)


# Several optimizers, several modules


def test_two_optimizers_of_a_module_have_a_plugin_each(said):
    model = Blocks()
    first, second = sgd(model.layers[:2].parameters()), sgd(model.layers[2].parameters())
    plugins = [spectral_ds.attach(model, each, SECTION) for each in (first, second)]
    gradients = gradients_of(model)
    parts = [{n: g for n, g in gradients.items() if ("layers.2" in n) == last} for last in (0, 1)]
    wanted = filtered(model, parts[0]) | filtered(model, parts[1])
    before = as_arrays(model, gradients)
    second.step()
    first.step()
    after = as_arrays(model, gradients)
    assert_is({name: before[name] - after[name] for name in before}, wanted)
    assert [spectral_ds.plugin_of(each) for each in (first, second)] == plugins
    assert spectral_ds.plugin_of(model) is plugins[0]
    plugins[0].detach()
    assert spectral_ds.plugin_of(model) is plugins[1]
    assert said() == []


def test_two_optimizers_of_the_same_parameters_are_an_error_that_names_the_way_out():
    model = Blocks()
    plugin = spectral_ds.attach(model, sgd(model.parameters()), SECTION)
    head = sgd(model.layers[2].parameters())
    with pytest.raises(RuntimeError, match=r"layers\.2\.weight.*detach\(\) first") as caught:
        spectral_ds.attach(model, head, SECTION)
    assert "parameters of its own" in str(caught.value)
    plugin.detach()
    spectral_ds.attach(model, head, SECTION).detach()


def test_another_optimizer_of_the_same_parameters_is_named_at_its_first_step(said):
    model = Blocks()
    spectral_ds.attach(model, sgd(model.parameters()), SECTION)
    other = torch.optim.Adam(model.layers[2].parameters())
    for _ in range(2):
        gradients_of(model)
        other.step()
    [message] = said()
    assert "not filtered: a step of Adam" in message
    assert "attached to SGD" in message


def test_an_optimizer_inside_or_around_the_attached_one_is_no_other(said):
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            self.inner.step()

    for attached in ("inner", "outer"):
        model = Blocks()
        outer = Outer(model.parameters(), lr=1.0)
        outer.inner = sgd(model.parameters())
        optimizer = outer if attached == "outer" else outer.inner
        plugin = spectral_ds.attach(model, optimizer, SECTION)
        wanted = filtered(model, gradients_of(model))
        assert_is(step_of(model, outer), wanted)
        plugin.detach()
    assert said() == []
