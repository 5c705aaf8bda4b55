"""The regularization term equals autograd and the dense oracle, joint and decoupled."""

import functools

import numpy as np
import oracle
import pytest
import tiny
import torch
from cells import CELLS, Training, one_step
from expected import relative_error

import spectral_ds

EDGES = [{"family": "depth", "weight": 2.0}, {"family": "similarity", "neighbours": 4}]
GRAPH = {"edges": EDGES, "laplacian": "combinatorial"}
IDLE = {"response": "identity"}
STRENGTH, RIDGE = 1e-3, 0.7
# Where the term must stand out of low precision, or of what is left of small differences.
STRONG = 0.1


def section(filter_keys=IDLE, **regularizer):
    return {
        "graph": GRAPH,
        "filter": filter_keys,
        "monitor": {"interval": 1},
        "regularizer": {"strength": STRENGTH, "ridge": RIDGE, **regularizer},
    }


def adjacency_of(weights):
    """W over the filtered parameters."""
    chosen = {n: w for n, w in weights.items() if tiny.is_filtered(n)}
    return oracle.adjacency_of(chosen, GRAPH["edges"])


def laplacian_of(weights):
    """L over the filtered parameters."""
    return oracle.laplacian_of(adjacency_of(weights), GRAPH["laplacian"])


def penalized(laplacian, difference, response=lambda v: v):
    return oracle.apply_function(laplacian, lambda v: response(v) + RIDGE, difference)


def filtered_names(facts):
    return [n for n in facts["gradients"] if tiny.is_filtered(n)]


# r of the regularizer takes its numbers from the section of the filter, whose own response differs.
RESPONSES = {
    "bands": {"gains": [0, 0.5, 2], "order": 9},
    "highpass": {"cutoff": 0.3, "order": 8},
    "tikhonov": {"tau": 0.2, "tolerance": 1e-7},
}
DECOUPLED = {
    "laplacian": lambda v: v,
    "heat": lambda v: np.exp(-v),
    "identity": np.ones_like,
}
SMOOTH = {"response": "window", "alpha": 0.02, "strength": 1.0}
# Of each cell: r of a joint term, and of a decoupled one.
CASES = [
    ("plain", 1, "bands", "laplacian"),
    ("zero0", 2, "highpass", "identity"),
    ("zero1", 3, "highpass", "heat"),
    ("zero1-bf16-fp32-accumulation", 2, None, None),
    ("zero2", 2, "bands", "laplacian"),
    ("zero2-offload", 3, "bands", "heat"),
    ("zero2-bf16", 2, None, "laplacian"),
    ("zero2-fp16", 2, None, None),
    ("zero3", 3, "tikhonov", "laplacian"),
    ("zero3-offload-parameters", 2, "tikhonov", "identity"),
    ("fsdp2", 2, "bands", "laplacian"),
    ("hsdp", 4, "bands", "laplacian"),
    ("ddp", 2, "tikhonov", "heat"),
]
ONE_PRECISION = [case[:3] for case in CASES if case[2] is not None]


def strength_of(name):
    return STRENGTH if CELLS[name].precision == "fp32" else STRONG


def sections_of(name, joint, decoupled):
    """All with θ_ref = 0, so that Δ = θ at the first step."""
    found = {
        None: None,
        "smooth": section(SMOOTH, reference="zero", strength=strength_of(name)),
    }
    if joint is not None:
        keys = {**IDLE, **RESPONSES[joint]}
        found["joint"] = section(keys, reference="zero", response=joint)
    if decoupled is not None:
        smooth = {**IDLE, "tau": 1.0, "tolerance": 1e-7}
        found["decoupled"] = section(
            smooth, coupling="decoupled", reference="zero", response=decoupled
        )
    return found


@pytest.fixture(scope="module")
def steps(ranks):
    """By cell and section, the facts of the same step on every rank."""

    @functools.cache
    def run(name):
        [(_, world_size, *responses)] = [case for case in CASES if case[0] == name]
        sections = sections_of(name, *responses)
        by_rank = ranks(world_size).run(one_step, name, list(sections.values()), 2)
        return dict(zip(sections, zip(*by_rank, strict=True), strict=True))

    return run


@pytest.mark.parametrize("name", [name for name, *_ in CASES])
def test_joint_gradient_is_added_before_the_filter(steps, name):
    plain = steps(name)[None][0]
    weights = {n: plain["weights"][n] for n in filtered_names(plain)}
    laplacian = laplacian_of(weights)
    term = penalized(laplacian, weights)
    joint = {n: plain["gradients"][n] + strength_of(name) * term[n] for n in weights}
    expected = oracle.apply_function(laplacian, oracle.response_of(SMOOTH), joint)
    energy = sum((weights[n] * term[n]).sum() for n in weights) / 2
    unused = [n for n in expected if n.startswith("spare")]
    assert unused
    if CELLS[name].stage == 0:
        unused = []  # DeepSpeed gives it zeros there, which the ranks may share with a used one
    expected = {n: g for n, g in expected.items() if n not in unused}
    tolerance = 1e-5 if CELLS[name].precision == "fp32" else 1e-2
    for result in steps(name)["smooth"]:
        assert relative_error(result["gradients"], expected) <= tolerance
        for parameter in unused:  # no gradient: nothing is added to it
            np.testing.assert_array_equal(result["after"][parameter], plain["weights"][parameter])
        metrics = result["metrics"]
        np.testing.assert_allclose(metrics["regularizer"], energy, rtol=max(tolerance, 1e-4))
        distance = np.sqrt(sum((w**2).sum() for w in weights.values()))
        np.testing.assert_allclose(metrics["perturbation"], distance, rtol=max(tolerance, 1e-4))


@pytest.mark.parametrize(("name", "world_size", "response"), ONE_PRECISION)
def test_joint_gradient_of_a_penalty_by_another_response(steps, name, world_size, response):
    plain = steps(name)[None][0]
    weights = {n: plain["weights"][n] for n in filtered_names(plain)}
    adjacency = adjacency_of(weights)
    function = oracle.response_of(
        {"response": response, "strength": 1.0, **RESPONSES[response]},
        oracle.bound_of(adjacency, "combinatorial"),
    )
    term = penalized(oracle.laplacian_of(adjacency, "combinatorial"), weights, function)
    energy = sum((weights[n] * term[n]).sum() for n in weights) / 2
    used = [n for n in weights if not n.startswith("spare")]
    expected = {n: plain["gradients"][n] + STRENGTH * term[n] for n in used}
    for result in steps(name)["joint"]:
        assert relative_error(result["gradients"], expected) <= 1e-5
        np.testing.assert_allclose(result["metrics"]["regularizer"], energy, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "response"), [(name, last) for name, *_, last in CASES if last is not None]
)
def test_decoupled_term_acts_after_the_step_times_the_learning_rate(steps, name, response):
    plain = steps(name)[None][0]
    after = {n: plain["after"][n] for n in filtered_names(plain)}
    laplacian = laplacian_of({n: plain["weights"][n] for n in after})
    term = penalized(laplacian, after, DECOUPLED[response])
    tolerance = 1e-5 if CELLS[name].precision == "fp32" else 1e-2
    rates = plain["rates"]
    expected = {n: after[n] - rates[n] * STRENGTH * term[n] for n in after}
    for result in steps(name)["decoupled"]:
        assert relative_error(result["after"], expected) <= tolerance


def autograd_step():
    """(plugin's gradient, autograd's) of the joint loss on one process, after one free step."""
    training = Training("plain", section(strength=STRONG), rates=(0.5, 0.25))
    reference = training.snapshot()
    names = [n for n in reference if tiny.is_filtered(n) and "down_proj" not in n]
    trained = {n: p for n, p in training.module.named_parameters() if p.requires_grad}
    laplacian = training.plugin.graph.laplacian().toarray()
    order = [p.name for p in training.plugin.graph.parameters]
    training.step(0)  # Δ is not zero afterwards
    loss = training.module(tiny.batches(1, 1)[0]).double()
    moved = {n: trained[n].double() - torch.from_numpy(reference[n]).double() for n in order}
    first, _ = oracle.numbering({n: reference[n] for n in order})
    shifted = torch.from_numpy(laplacian) + RIDGE * torch.eye(len(laplacian), dtype=torch.float64)
    term = 0.0
    for width in {moved[n].shape[-1] for n in order}:
        same = [n for n in order if moved[n].shape[-1] == width]
        rows = [moved[n].reshape(-1, width) for n in same]
        numbers = [first[n] + i for n, r in zip(same, rows, strict=True) for i in range(len(r))]
        block = shifted[numbers][:, numbers]
        signal = torch.cat(rows)
        term = term + 0.5 * (signal * (block @ signal)).sum()
    joint = loss + STRONG * term
    joint.backward()
    exact = {n: trained[n].grad.numpy().copy() for n in order if trained[n].grad is not None}
    training.optimizer.zero_grad()
    training.plugin.observe_loss(loss)
    before = training.snapshot()
    training.step(1)
    after = training.snapshot()
    group_rate = {
        id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]
    }
    got = {n: (before[n] - after[n]) / group_rate[id(trained[n])] for n in exact}
    metrics = training.plugin.metrics()
    training.close()
    assert names
    return got, exact, metrics, float(joint), float(term)


def test_joint_gradient_is_autograd_of_the_joint_loss(ranks):
    got, exact, metrics, joint, term = ranks(1).run(autograd_step)[0]
    used = {n: g for n, g in exact.items() if not n.startswith("spare")}
    assert relative_error(got, used, 1) <= 1e-4  # weights before minus after, at small rates
    np.testing.assert_allclose(metrics["regularizer"], term, rtol=1e-4)
    np.testing.assert_allclose(metrics["joint_loss"], joint, rtol=1e-4)


def test_strength_that_overshoots_warns(ranks, caplog):
    def attach():
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        settings = {"regularizer": {"strength": 10, "coupling": "decoupled"}}
        return spectral_ds.attach(model, optimizer, settings)

    with caplog.at_level("WARNING"):
        attach().detach()
    assert "overshoots" in caplog.text
