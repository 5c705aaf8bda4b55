"""What holds of the operator and of the filter for any parameters and any edges."""

import numpy as np
import oracle
import torch
from any_model import SEEDS, models, quick
from hypothesis import given
from hypothesis import strategies as st

from spectral_ds.filters import Heat, Polynomial, Tikhonov, Window

RESPONSES = st.one_of(
    st.builds(Heat, st.floats(0, 4)),
    st.builds(Tikhonov, st.floats(0, 4)),
    st.builds(Window, st.floats(0, 1)),
    st.just(Polynomial((0.5, -0.25, 0.125))),
)


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
