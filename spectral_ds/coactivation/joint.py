"""Joint functions: what is kept of the changes of several models, G_i = T_i (Σ_j T_j + μR)⁻¹.

W = W₀ + Σ_i ΔW_i G_i minimizes Σ_i E_i‖(W₀ + ΔW_i − W)x‖² + μ E_keep‖(W − W₀)x‖², with T_i of the
inputs of model i and R of inputs to keep: RegMean (arXiv 2212.09849, eq. 2) with the pretrained
model as one more, its weight μ. All graphs have mean eigenvalue 1, so that models count alike.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from spectral_ds.coactivation.one_thread import one_thread
from spectral_ds.coactivation.spectrum import Spectrum
from spectral_ds.coactivation.subspace import (
    RIDGE,
    SubspaceFunction,
    function_of,
    joint_basis,
    within,
)


@one_thread
def functions_of(
    keep: Spectrum, learn: Sequence[Spectrum | None], mu: float
) -> list[SubspaceFunction]:
    """G_i of each model. Of one alone, G is that of `tikhonov`: T(T + μR)⁻¹, or (I + μR)⁻¹.

    Exact for the graphs as they are given; outside of the directions of all of them every graph is
    a multiple of I. With μ = 0 and nothing learned, G_i = I / (number of models): the average.

    Args:
        keep: R.
        learn: T_i; None: I.
        mu: μ >= 0.
    """
    if len(learn) == 1:
        return [function_of(lambda a: 1 / (1 + mu * a), keep, learn[0])]
    nothing = np.zeros((keep.inputs, 0), np.float32)
    everything = Spectrum(np.zeros(0), nothing, 1.0)
    learned = [everything if each is None else each for each in learn]
    basis = joint_basis((keep, *learned))
    inside = [within(basis, each) for each in learned]
    whole = sum(inside) + mu * within(basis, keep)
    total = sum(each.rest + RIDGE for each in learned) + mu * (keep.rest + RIDGE)
    found = []
    for each, t in zip(learned, inside, strict=True):
        constant = (each.rest + RIDGE) / total
        core = scipy.linalg.solve(whole, t, assume_a="pos").T  # t and whole are symmetric
        found.append(SubspaceFunction(constant, basis, core - constant * np.eye(basis.shape[1])))
    return found
