"""Hooks after the base optimizer's update: what they edit becomes the model's parameters.

A run of an engine alone halves every update and adds a term that depends on the element's place in
its parameter, so that a view that begins at the wrong element shows.
"""

import zlib
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from cells import CELLS, PARAMETERS_ON_CPU, Cell, Training

from spectral_ds.engines import UnsupportedEngineError, engine_for

RATES = {torch.optim.SGD: (0.5, 0.25), torch.optim.AdamW: tiny.ADAM_RATES}
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALL_CELLS = {
    **CELLS,
    "zero0-bf16-fused": Cell("deepspeed", 0, "bf16"),
    "zero2-round-robin": Cell("deepspeed", 2, zero={"round_robin_gradients": True}),
    "zero3-bf16-small-sub-groups-offload-parameters": Cell(
        "deepspeed", 3, "bf16", zero={**PARAMETERS_ON_CPU, "sub_group_size": 2000}
    ),
}


def edited(old, new, name, start):
    """What a run here makes of an update of elements `start` and on of a flat parameter."""
    place = torch.arange(start, start + len(new), device=old.device)
    place += zlib.crc32(name.encode()) % 1009
    return old + 0.5 * (new - old) + (place * 37 % 101 - 50) * 2.0**-13


class Editor:
    """Both hooks of an engine, and what they saw."""

    def __init__(self, training):
        self.engine = engine_of(training)
        self.calls = 0
        self.errors = []  # of weights after the update, were it one of SGD
        self.scales = []
        self.engine.install(self.before_step, self.after_update)

    def before_step(self):
        engine = self.engine
        self.scales.append(engine.loss_scale)
        self.old = [weight.clone() for weight in engine.weights()]
        self.descended = [
            old if gradient is None else old - rate * gradient.float() / engine.loss_scale
            for old, gradient, rate in zip(
                self.old, engine.gradients(), engine.learning_rates(), strict=True
            )
        ]

    def after_update(self):
        self.calls += 1
        for weight, fragment, old, descended in zip(
            self.engine.weights(), self.engine.fragments, self.old, self.descended, strict=True
        ):
            assert weight.dtype == torch.float32
            if len(weight) > 0:
                self.errors.append((weight - descended).abs().max().item())
            weight.copy_(edited(old, weight, fragment.parameter, fragment.start))

    def whole_weights(self):
        """`weights()` of all ranks, by parameter."""
        engine = self.engine
        found = {n: torch.full((np.prod(s),), torch.nan) for n, s in engine.shapes.items()}
        own = list(zip(engine.fragments, [w.clone().cpu() for w in engine.weights()], strict=True))
        for fragments in engine.communicator.gather_objects(own):
            for fragment, weight in fragments:
                found[fragment.parameter][fragment.start : fragment.end] = weight
        return {n: w.view(engine.shapes[n]).numpy() for n, w in found.items()}


def engine_of(training):
    if training.cell.engine == "deepspeed":
        return engine_for(training.engine)
    return engine_for(training.wrapped, training.optimizer)


def base_optimizer(training):
    if training.cell.engine == "deepspeed":
        return training.engine.basic_optimizer
    return training.optimizer


def left_behind(training):
    """What is still hooked."""
    optimizer = base_optimizer(training)
    found = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    if training.cell.engine == "deepspeed":
        found += {"_take_model_step"} & vars(training.engine).keys()
        found += {"_optimizer_step"} & vars(training.engine.optimizer).keys()
    return found


def start(name, optimizer=torch.optim.SGD, **arguments):
    usual = deepspeed.runtime.engine.FusedAdam
    if name.endswith("-fused"):  # DeepSpeed then keeps flat float32 weights
        deepspeed.runtime.engine.FusedAdam = optimizer
    try:
        return Training(ALL_CELLS[name], None, optimizer, RATES[optimizer], **arguments)
    finally:
        deepspeed.runtime.engine.FusedAdam = usual


def two_edited_steps_and_a_usual_one(name, optimizer, accumulation, model):
    training = start(name, optimizer, accumulation=accumulation, model=model)
    facts = {"before": training.snapshot(), "steps": []}
    editor = Editor(training)
    for index in range(3):
        if index == 1:
            for group in base_optimizer(training).param_groups:
                group["lr"] *= 0.5
        if index == 2:
            editor.engine.remove()
        training.step(index)
        facts["steps"].append((editor.whole_weights(), training.snapshot()))
    facts["calls"], facts["scales"] = editor.calls, editor.scales
    facts["left"] = left_behind(training)
    facts["error"] = np.max(editor.errors, initial=0.0)
    facts["owned"] = sum(fragment.length for fragment in editor.engine.fragments)
    training.close()
    return facts


def the_same_without_an_engine(before, optimizer, model):
    """All weights after each of the three steps, on one process, in float32."""
    module = model()
    named = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in before.items():
            named[name].copy_(torch.from_numpy(value))
    stepper = optimizer(tiny.parameter_groups(module, RATES[optimizer]))
    after = []
    for index in range(3):
        if index == 1:
            for group in stepper.param_groups:
                group["lr"] *= 0.5
        old = {n: p.detach().clone() for n, p in named.items() if p.requires_grad}
        module(tiny.batches(1, index)[0].cpu()).backward()
        stepper.step()
        stepper.zero_grad()
        if index < 2:
            with torch.no_grad():
                for name, value in old.items():
                    new = named[name].view(-1)
                    new.copy_(edited(value.view(-1), new, name, 0))
        after.append({n: p.detach().numpy().copy() for n, p in named.items()})
    return after


@pytest.fixture(scope="module")
def reference(ranks):
    """The run without an engine, from the same initial weights."""
    known = {}

    def run(before, optimizer, model):
        key = optimizer, model, b"".join(before[n].tobytes() for n in sorted(before))
        if key not in known:
            [known[key]] = ranks(1).run(the_same_without_an_engine, before, optimizer, model)
        return known[key]

    return run


def check(results, cell, expected):
    dtype = LOW_PRECISION.get(cell.precision) if cell.engine == "deepspeed" else None
    scale = 64.0 if cell.precision == "fp16" else 1.0
    for facts in results:
        assert (facts["calls"], facts["scales"], facts["left"]) == (2, [scale, scale], [])
        for (weights, parameters), reference in zip(facts["steps"], expected, strict=True):
            for name, value in weights.items():
                # Low precision gradients differ in the third digit from those of the reference.
                tolerance = 2e-6 if cell.precision == "fp32" else 1e-3
                np.testing.assert_allclose(
                    value, reference[name], atol=tolerance, equal_nan=False, err_msg=name
                )
                rounded = torch.from_numpy(value).to(dtype).float().numpy() if dtype else value
                np.testing.assert_array_equal(parameters[name], rounded, err_msg=name)
            for name in parameters.keys() - weights.keys():  # frozen
                np.testing.assert_array_equal(parameters[name], facts["before"][name])


# Ranks and micro-batches of cells that have more than the others.
LARGER = {
    "zero1-bf16-fp32-accumulation": (3, 2),
    "zero2-offload": (3, 2),
    "zero3-bf16-small-sub-groups-offload-parameters": (3, 2),
    "fsdp2": (3, 2),
    "hsdp": (4, 1),
}


@pytest.mark.parametrize(
    ("name", "world_size", "accumulation"),
    [
        (name, *LARGER.get(name, (min(2, max(cell.world_sizes)), 1)))
        for name, cell in ALL_CELLS.items()
    ],
)
def test_edited_updates_become_the_parameters(ranks, reference, name, world_size, accumulation):
    optimizer, model = torch.optim.SGD, tiny.TinyLlama
    results = ranks(world_size).run(
        two_edited_steps_and_a_usual_one, name, optimizer, accumulation, model
    )
    # With SGD: rate × gradient / scale.
    assert np.max([facts["error"] for facts in results]) <= 1e-6
    check(results, ALL_CELLS[name], reference(results[0]["before"], optimizer, model))


@pytest.mark.parametrize("name", ["zero2-offload", "zero3-small-sub-groups"])
def test_edited_updates_of_adamw_become_the_parameters(ranks, reference, name):
    optimizer, model = torch.optim.AdamW, tiny.TinyLlama
    results = ranks(2).run(two_edited_steps_and_a_usual_one, name, optimizer, 1, model)
    expected = reference(results[0]["before"], optimizer, model)
    for weights, parameters in results[0]["steps"]:
        for parameter, value in weights.items():
            np.testing.assert_array_equal(parameters[parameter], value)
    for (weights, _), after in zip(results[0]["steps"], expected, strict=True):
        for parameter, value in weights.items():
            # DeepSpeed also decays weights without gradients; torch leaves them alone.
            np.testing.assert_allclose(value, after[parameter], atol=1e-5, equal_nan=False)


class ThreePairs(torch.nn.Module):
    """So few elements that some of four ranks own none."""

    def __init__(self):
        super().__init__()
        self.pairs = torch.nn.ParameterList(torch.tensor([0.5, -i]) for i in range(1, 4))

    def forward(self, tokens):
        inputs = tokens[:, :2] / 53
        return sum((inputs @ pair - 1).square().mean() for pair in self.pairs)


@pytest.mark.parametrize("name", ["zero2", "zero3-offload", "fsdp2"])
def test_the_hook_is_called_on_ranks_that_own_nothing(ranks, reference, name):
    optimizer = torch.optim.SGD
    results = ranks(4).run(two_edited_steps_and_a_usual_one, name, optimizer, 1, ThreePairs)
    assert min(facts["owned"] for facts in results) == 0
    check(results, ALL_CELLS[name], reference(results[0]["before"], optimizer, ThreePairs))


def sound_steps_around_two_that_overflow(name):
    """Calls after each step, whether the two left the weights alone, scales at each step."""
    training = start(name)
    editor = Editor(training)
    calls, before = [], None
    for index in range(4):
        if index == 1:
            before = training.snapshot(), editor.whole_weights()
        [tokens] = tiny.batches(1, index)
        factor = torch.inf if index in (1, 2) and dist.get_rank() == 1 else 1.0
        training.engine.backward(training.engine(tokens) * factor)
        training.engine.step()
        calls.append(editor.calls)
        if index == 2:
            after = training.snapshot(), editor.whole_weights()
    same = all(
        np.array_equal(value, old[name])
        for new, old in zip(after, before, strict=True)
        for name, value in new.items()
    )
    finite = all(np.isfinite(value).all() for value in training.snapshot().values())
    editor.engine.remove()
    training.close()
    return calls, same, finite, editor.scales, np.max(editor.errors)


@pytest.mark.parametrize(
    "name",
    [
        "zero1-fp16",
        "zero2-fp16-offload",
        "zero3-fp16",
        "zero0-bf16",
        "zero1-bf16-fp32-accumulation",
    ],
)
def test_the_hook_is_not_called_on_a_step_that_overflows(ranks, name):
    # The second overflow in succession halves the scale.
    scales = [64, 64, 64, 32] if "fp16" in name else [1] * 4
    for *facts, error in ranks(2).run(sound_steps_around_two_that_overflow, name):
        assert facts == [[1, 1, 1, 2], True, True, scales]
        assert error <= 1e-6


def refused(training):
    """What is said to both hooks by an engine that takes the first alone; what they left behind."""
    engine = engine_of(training)
    engine.install(lambda: None)
    engine.remove()
    try:
        engine.install(lambda: None, lambda: None)
    except UnsupportedEngineError as error:
        message = str(error)
    else:
        message = "nothing"
    return message, left_behind(training)


def install_without(name, method):
    training = start(name)
    kind = type(training.engine.optimizer)
    removed = getattr(kind, method)
    delattr(kind, method)
    try:
        return refused(training)
    finally:
        setattr(kind, method, removed)
        training.close()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("zero2", "_optimizer_step"),
        ("zero3", "_optimizer_step"),
        ("zero3", "_reassign_or_swap_out_partitioned_parameters"),
    ],
)
def test_a_missing_place_for_the_hook_is_named_at_install(ranks, name, method):
    for message, hooked in ranks(2).run(install_without, name, method):
        assert f".{method}" in message
        assert hooked == []


def install_with(name, attribute, value):
    """Where DeepSpeed's optimizer has such a value."""
    training = start(name)
    assert hasattr(training.engine.optimizer, attribute)
    setattr(training.engine.optimizer, attribute, value)
    found = refused(training)
    training.close()
    return found


@pytest.mark.parametrize(
    ("name", "attribute", "value", "words"),
    [
        ("zero2", "torch_autocast_gradscaler", "a scaler", ["torch_autocast", "use bfloat16"]),
        ("zero3", "torch_autocast_gradscaler", "a scaler", ["torch_autocast", "use bfloat16"]),
        ("zero0-bf16-fused", "fused_adam_legacy", True, ["legacy_fusion", "set it to false"]),
    ],
)
def test_acting_on_updates_is_refused_where_the_optimizer_leaves_no_place(
    ranks, name, attribute, value, words
):
    for message, hooked in ranks(2).run(install_with, name, attribute, value):
        assert "does not support acting on updates" in message
        for word in words:
            assert word in message
        assert hooked == []


def scale_by_torch(name):
    """The loss scale of an engine before and after it has a scaler of torch's."""
    training = start(name)
    engine = engine_of(training)
    found = [engine.loss_scale]
    if name == "zero0":
        holder, attribute = training.engine, "torch_autocast_z0_gradscaler"
    else:
        holder, attribute = training.engine.optimizer, "torch_autocast_gradscaler"
    assert hasattr(holder, attribute)
    setattr(holder, attribute, SimpleNamespace(get_scale=lambda: 1024))
    found.append(engine.loss_scale)
    training.close()
    return found


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_the_loss_scale_is_that_of_torchs_scaler_where_there_is_one(ranks, name):
    assert ranks(1).run(scale_by_torch, name) == [[1.0, 1024.0]]
