"""What holds of the operator and of the filter for any parameters and any edges."""

import numpy as np
import oracle
import torch
from any_model import DEPTH, SEEDS, SIMILARITY, models, quick
from hypothesis import given
from hypothesis import strategies as st

from spectral_ds.filters import Heat, Polynomial, Tikhonov, Window

RESPONSES = st.one_of(
    st.builds(Heat, st.floats(0, 4)),
    st.builds(Tikhonov, st.floats(0, 4)),
    st.builds(Window, st.floats(0, 1)),
    st.just(Polynomial((0.5, -0.25, 0.125))),
)


def combined(a, x, b, y):
    return {name: a * x[name] + b * y[name] for name in x}


def product(x, y):
    return sum((x[name] * y[name]).sum() for name in x)


def assert_close(x, y, tolerance):
    scale = max(1.0, *(np.abs(each).max() for each in y.values()))
    for name in x:
        np.testing.assert_allclose(x[name], y[name], rtol=0, atol=tolerance * scale)


def signal_of(model, seed):
    generator = np.random.default_rng(seed)
    return {p.name: generator.standard_normal(p.shape) for p in model.parameters}


@quick
@given(models(), st.sampled_from([1, 50, 300, 10**6]))
def test_buckets_hold_every_element_once_and_no_more_than_they_may(model, bucket_elements):
    graph = model.graph()
    shipments = model.plan(graph, bucket_elements).shipments
    times = [torch.zeros(p.numel, dtype=torch.float64) for p in model.parameters]
    for operator in (each for shipment in shipments for each in shipment.carry(times)):
        x, _, out = operator.scratch
        block = operator.block
        torch.add(x.values[: block.own], 1, out=out.values)
        if block.stored * block.width > bucket_elements:  # no smaller slice, and no other group
            assert block.width <= 16
            assert block.stored in {group.bucket.nodes for group in graph.groups}
    assert all((each == 1).all() for each in times)


@quick
@given(models(), SEEDS, st.sampled_from([1, 50, 10**6]))
def test_operator_is_the_laplacian_of_the_oracle(model, seed, bucket_elements):
    signal = signal_of(model, seed)
    laplacian = model.dense_laplacian()
    np.testing.assert_allclose(model.graph().laplacian().toarray(), laplacian, atol=1e-7)
    expected = oracle.apply_function(laplacian, lambda values: values, signal, model.kind)
    assert_close(model.times_laplacian(signal, bucket_elements), expected, 1e-7)


@quick
@given(models(), SEEDS)
def test_operator_is_symmetric_and_its_spectrum_is_bounded(model, seed):
    x, y = signal_of(model, seed), signal_of(model, seed + 1)
    lx, ly = model.times_laplacian(x), model.times_laplacian(y)
    norm = product(x, x)
    np.testing.assert_allclose(product(y, lx), product(ly, x), rtol=1e-9, atol=1e-9)
    assert -1e-9 * norm <= product(x, lx) <= model.graph().lambda_max * norm * (1 + 1e-9)


@quick
@given(models(), SEEDS, st.floats(-3, 3), st.floats(-3, 3))
def test_operator_is_linear(model, seed, a, b):
    x, y = signal_of(model, seed), signal_of(model, seed + 1)
    together = model.times_laplacian(combined(a, x, b, y))
    expected = combined(a, model.times_laplacian(x), b, model.times_laplacian(y))
    assert_close(together, expected, 1e-10)


@quick
@given(models(normalized=False), SEEDS)
def test_a_signal_equal_at_all_nodes_has_frequency_zero(model, seed):
    """Any row of numbers, the same at all nodes of its width."""
    generator = np.random.default_rng(seed)
    row = {width: generator.standard_normal(width) for width in {p.width for p in model.parameters}}
    constant = {
        p.name: oracle.from_nodes(np.tile(row[p.width], (p.nodes, 1)), p.shape, p.kind)
        for p in model.parameters
    }
    for name, each in model.times_laplacian(constant).items():
        np.testing.assert_allclose(each, 0, atol=1e-9, err_msg=name)


# The filter


@quick
@given(models(), SEEDS, RESPONSES, st.floats(0, 1))
def test_filter_is_that_of_the_dense_eigenbasis(model, seed, response, strength):
    signal = signal_of(model, seed)
    expected = oracle.apply_function(
        model.dense_laplacian(),
        lambda values: 1 - strength + strength * response(values),
        signal,
        model.kind,
    )
    assert_close(model.filtered(signal, response, strength), expected, 1e-5)


@quick
@given(models(least=2, families=(SIMILARITY,)), SEEDS, st.data())
def test_filter_does_not_care_how_nodes_of_a_parameter_are_numbered(model, seed, data):
    name = data.draw(st.sampled_from(list(model.weights)))
    assert_equivariant(model, [name], signal_of(model, seed), data)


@quick
@given(models(least=2, families=(DEPTH, SIMILARITY)), SEEDS, st.data())
def test_filter_does_not_care_how_nodes_of_a_role_are_numbered(model, seed, data):
    """In all blocks alike, so that depth still joins the same nodes."""
    chosen = data.draw(st.sampled_from(model.parameters))
    names = [p.name for p in model.parameters if (p.role, p.shape) == (chosen.role, chosen.shape)]
    assert_equivariant(model, names, signal_of(model, seed), data)


def assert_equivariant(model, names, signal, data):
    """Relabelling nodes of some parameters relabels the Laplacian and the filtered signal."""
    [nodes] = {p.nodes for p in model.parameters if p.name in names}
    order = np.array(data.draw(st.permutations(range(nodes))))

    def relabelled(arrays):
        return {
            name: oracle.from_nodes(oracle.as_nodes(a, model.kind)[order], a.shape, model.kind)
            if name in names
            else a
            for name, a in arrays.items()
        }

    other = model._replace(weights=relabelled(model.weights))
    first, total = oracle.numbering(model.weights, model.kind)
    node = np.arange(total)
    for name in names:
        node[first[name] : first[name] + len(order)] = first[name] + order
    laplacian = model.graph().laplacian().toarray()
    np.testing.assert_allclose(
        other.graph().laplacian().toarray(), laplacian[np.ix_(node, node)], atol=1e-7
    )
    response = Heat(1.0)
    expected = relabelled(model.filtered(signal, response))
    assert_close(other.filtered(relabelled(signal), response), expected, 1e-5)
