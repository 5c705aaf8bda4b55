"""The density of states, against dense eigenvalues; what the plugin's spectra do not take."""

import numpy as np
import pytest
import torch
from synthetic import GRAPHS, Sharded, smooth_bands

import spectral_ds
from spectral_ds.spectrum import (
    density_of_states,
)

PROBES = 64


def densities(name, alone=False):
    """Of all eigenvalues, exactly and estimated."""
    sharded = Sharded(*GRAPHS[name], alone=alone)
    return [
        density_of_states(
            sharded.graph, 8, sharded.communicator, seed=5, probes=PROBES, dense_nodes=dense_nodes
        )
        for dense_nodes in (1024, 0)
    ]


@pytest.mark.parametrize("name", ["similarity", "columns", "components", "ring", "depth"])
def test_density_is_that_of_the_dense_eigenvalues(ranks, name):
    graph = Sharded(*GRAPHS[name], alone=True).graph
    values, vectors = np.linalg.eigh(graph.laplacian().toarray())
    exact, estimated = densities(name, alone=True)
    edges = np.linspace(0, graph.lambda_max, 9)
    for density in (exact, estimated):
        np.testing.assert_allclose(density.edges, edges, rtol=1e-12)
        assert density.share.sum() == pytest.approx(1)
    # An eigenvalue at an edge, as many are of rings and paths, may count to either side.
    counted = np.cumsum(exact.share) * len(values)
    assert (
        counted >= [(values < edge - 1e-9).sum() for edge in edges[1:]] - np.float64(1e-9)
    ).all()
    assert (
        counted <= [(values < edge + 1e-9).sum() for edge in edges[1:]] + np.float64(1e-9)
    ).all()

    if name == "depth":
        np.testing.assert_array_equal(estimated.share, exact.share)
    else:
        # The estimate of trace P_b, P_b a band with smooth edges, is the mean of PROBES numbers
        # z' P_b z, whose variance is twice the sum of squares off P_b's diagonal.
        gains = smooth_bands(np.linspace(0, 1, 9), 32, values / graph.lambda_max)
        for gain, share in zip(gains, estimated.share, strict=True):
            band = (vectors * gain) @ vectors.T
            variance = 2 * np.square(band - np.diag(np.diag(band))).sum() / PROBES
            assert abs(share * len(values) - gain.sum()) <= 4 * np.sqrt(variance)
        # Smooth edges let an eigenvalue leak into the next band.
        counts = np.histogram(values.clip(0), edges)[0] / len(values)
        assert np.abs(estimated.share - counts).max() <= 0.1
    for world_size in (2, 3):
        for others in ranks(world_size).run(densities, name):
            for one, other in zip((exact, estimated), others, strict=True):
                np.testing.assert_allclose(other.share, one.share, atol=1e-5)


@pytest.fixture(scope="module")
def plain_plugin():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
    section = {"graphs": [{}, {"node": "column"}, {}]}
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), section)
    yield plugin
    plugin.detach()


@pytest.mark.parametrize(
    ("method", "argument", "value"),
    [
        *(("eigenpairs", "k", value) for value in (0, -1, 2.5)),
        *(("density", "bins", value) for value in (0, -1, 2.5)),
        *((m, "graph", value) for m in ("eigenpairs", "density", "snr") for value in (3, -1)),
    ],
)
def test_an_impossible_argument_is_named_with_its_value(plain_plugin, method, argument, value):
    arguments = {"eigenpairs": {"k": 2}, "density": {"bins": 2}, "snr": {}}[method]
    getattr(plain_plugin, method)(**arguments, graph=1)
    with pytest.raises(ValueError, match=rf"^{argument} = {value}: must be"):
        getattr(plain_plugin, method)(**{**arguments, argument: value})
