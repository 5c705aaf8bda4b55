"""Energy by frequency band from Chebyshev moments."""

import numpy as np
import numpy.typing as npt


def band_energies(moments: npt.NDArray[np.float64], bands: int) -> npt.NDArray[np.float64]:
    """e_b = ‖P_b X‖²/‖X‖² for equal bands of [0, λ_max], lowest first.

    The bands' edges are smooth on the scale λ_max/moments (Jackson kernel, Weiße et al. 2006,
    eq. 71), so that energies are never negative.

    Args:
        moments: (count,): μ_j of the signal.
        bands: number of bands.

    Returns:
        (bands,), float64, sums to 1; all 0 for a zero signal.
    """
    if moments[0] == 0:
        return np.zeros(bands)
    count = len(moments)
    order = np.arange(1, count)
    angle = np.pi / (count + 1)
    jackson = (
        (count - order + 1) * np.cos(angle * order) + np.sin(angle * order) / np.tan(angle)
    ) / (count + 1)
    # The indicator of [a, b] in x = cos θ is that of [θ_b, θ_a]; its cosine series:
    edge = np.arccos(np.linspace(-1, 1, bands + 1))[:, None]
    integral = np.concatenate((edge / np.pi, 2 * np.sin(order * edge) / (order * np.pi)), axis=1)
    coefficients = integral[:-1] - integral[1:]
    coefficients[:, 1:] *= jackson
    return np.asarray(coefficients @ moments / moments[0])
