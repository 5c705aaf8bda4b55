"""Ways to call a step where ranks train together: each gradient is filtered once on all of them."""

import cells
import numpy as np
import tiny
import torch
from ring_steps import SECTION, SGD, UPDATE, smoothed
from said import messages

import spectral_ds


class Twice(torch.optim.SGD):
    """A subclass whose step is also its base class's, of which torch runs the hooks, too."""

    def step(self, closure=None):
        return super().step(closure)


def take(training, how, index):
    """One step of a cell, called in another way than usual."""
    (tokens,) = tiny.batches(1, index)
    if how == "closure":

        def closure():
            training.optimizer.zero_grad()
            loss = training.wrapped(tokens)
            loss.backward()
            return loss

        training.optimizer.step(closure)
    elif how == "optimizer":
        training.engine.backward(training.engine(tokens))
        training.engine.optimizer.step()
        training.engine.optimizer.zero_grad()
    else:
        training.step(index)


def two_steps(name, section, how, optimizer=torch.optim.SGD):
    """Weights before and after each of two steps, and the steps counted."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # from now on torch hooks its step
    training = cells.Training(cells.CELLS[name], section, optimizer, (1.0, 0.5))
    found, counted = [training.snapshot()], []
    for index in range(2):
        take(training, how, index)
        found.append(training.snapshot())
        counted.append(None if training.plugin is None else training.plugin.engine.step)
    training.close()
    return found, counted


def ways(cases):
    """Weights of two plain steps, of two filtered ones as usual, and of each case."""
    plain = two_steps("ddp", None, "usual")
    usual = two_steps("ddp", SECTION, "usual")
    return plain, usual, [two_steps(*case) for case in cases]


CASES = [
    *((f"zero{stage}", SECTION, "optimizer") for stage in range(4)),
    *((f"zero{stage}", UPDATE, "optimizer") for stage in (0, 3)),
    ("zero2-offload", SECTION, "optimizer"),
    ("zero1-bf16-fp32-accumulation", SECTION, "optimizer"),
    ("zero0", SECTION, "optimizer", Twice),
    ("zero0", UPDATE, "engine", Twice),
    ("ddp", SECTION, "closure"),
    ("fsdp2", SECTION, "closure"),
    ("fsdp2", UPDATE, "closure"),
]


def test_every_way_to_step_gives_what_the_usual_one_gives(ranks):
    for (plain, _), (usual, _), found in ranks(2).run(ways, CASES):
        moved = {name: plain[0][name] - plain[1][name] for name in plain[0]}
        largest = max(np.abs(each).max() for each in moved.values())
        for name in filter(tiny.is_filtered, moved):
            step = usual[0][name] - usual[1][name]
            np.testing.assert_allclose(step, smoothed(moved[name]), atol=1e-5 * largest)
        for case, (weights, counted) in zip(CASES, found, strict=True):
            assert counted == [1, 2], case
            is_rounded = "bf16" in case[0]
            atol, rtol = (3e-2 * largest, 2**-8) if is_rounded else (1e-5 * largest, 0)
            for wanted, got in zip(usual, weights, strict=True):
                for name, value in wanted.items():
                    message = f"{case} {name}"
                    np.testing.assert_allclose(got[name], value, rtol, atol, err_msg=message)


def accumulate_and_step_the_optimizer(declares_boundary):
    """Two steps of two micro-batches by optimizer.step(); steps counted, what is said."""
    with messages() as said:
        training = cells.Training("zero0", SECTION, SGD, (1.0, 0.5), accumulation=2)
        engine, before = training.engine, training.snapshot()
        for index in range(2):
            for position, tokens in enumerate(tiny.batches(2, index)):
                if declares_boundary:
                    engine.set_gradient_accumulation_boundary(position == 1)
                engine.backward(engine(tokens))
            engine.optimizer.step()
            engine.optimizer.zero_grad()
    after, counted = training.snapshot(), spectral_ds.plugin_of(engine).engine.step
    engine.destroy()
    return before, after, counted, said


def checkpointed(folder):
    """Steps counted after two of the optimizer and one of the engine, and after they are loaded."""
    engine = cells.Training("zero2", SECTION, SGD, (1.0, 0.5)).engine
    for index in range(3):
        engine.backward(engine(tiny.batches(1, index)[0]))
        if index == 0:
            engine.step()
        else:
            engine.optimizer.step()
            engine.optimizer.zero_grad()
    counted = [spectral_ds.plugin_of(engine).engine.step]
    engine.save_checkpoint(folder)
    for _ in range(2):
        engine.load_checkpoint(folder)
        counted.append(spectral_ds.plugin_of(engine).engine.step)
        engine.backward(engine(tiny.batches(1)[0]))
        engine.optimizer.step()
    engine.destroy()
    return counted


def optimizer_steps(folder):
    parts = [accumulate_and_step_the_optimizer(declares) for declares in (True, False)]
    usual = cells.Training(cells.CELLS["zero0"], SECTION, SGD, (1.0, 0.5), accumulation=2)
    for index in range(2):
        usual.step(index)
    weights = usual.snapshot()
    usual.close()
    return parts, weights, checkpointed(folder)


def test_steps_of_deepspeeds_optimizer_go_by_its_boundaries_and_its_checkpoints(ranks, tmp_path):
    results = ranks(2).run(optimizer_steps, str(tmp_path))
    for rank, (parts, usual, counted) in enumerate(results):
        (before, after, steps, said), (*_, said_without) = parts
        largest = max(np.abs(before[name] - usual[name]).max() for name in before)
        for name, value in usual.items():
            np.testing.assert_allclose(after[name], value, atol=1e-5 * largest)
        assert (steps, said, counted) == (2, [], [3, 3, 3])
        assert len(said_without) == (rank == 0)
        assert all("before a boundary of gradient accumulation" in each for each in said_without)
