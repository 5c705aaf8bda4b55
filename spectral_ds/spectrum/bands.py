"""Bands of frequency with smooth edges, as Chebyshev coefficients.

Source: Weiße et al., "The kernel polynomial method", Rev. Mod. Phys. 78, 275 (2006): Jackson's
kernel, eq. 71, keeps the series of a step between 0 and 1 and smooths it over about π/count.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

# Chebyshev coefficients a band: enough that its smooth edges stay within the next bands.
COEFFICIENTS_PER_BAND = 4


def equal_edges(bands: int) -> Values:
    """Edges of equal bands of the spectrum [0, λ_max], as shares of it; (bands + 1,)."""
    return np.linspace(0, 1, bands + 1)


def band_coefficients(edges: Sequence[float] | Values, count: int) -> Values:
    """Coefficients of the smooth indicator of each band; in sum they are those of 1.

    Args:
        edges: ascending, from 0 to 1, as shares of [0, λ_max]; (bands + 1,).
        count: number of coefficients, of T_0 to T_(count − 1).

    Returns:
        (bands, count).
    """
    order = np.arange(1, count)
    angle = np.pi / (count + 1)
    jackson = (
        (count - order + 1) * np.cos(angle * order) + np.sin(angle * order) / np.tan(angle)
    ) / (count + 1)
    # The indicator of [a, b] in x = cos θ is that of [θ_b, θ_a]; its cosine series:
    angles = np.arccos(2 * np.asarray(edges) - 1)[:, None]
    integral = np.concatenate((angles / np.pi, 2 * np.sin(order * angles) / (order * np.pi)), 1)
    coefficients = integral[:-1] - integral[1:]
    coefficients[:, 1:] *= jackson
    return np.asarray(coefficients)


def band_energies(moments: Values, bands: int) -> Values:
    """e_b = ‖P_b X‖²/‖X‖² for equal bands, lowest first.

    Args:
        moments: (count,): μ_j of the signal.
        bands: number of bands.

    Returns:
        (bands,), float64, sums to 1; all 0 for a zero signal.
    """
    if moments[0] == 0:
        return np.zeros(bands)
    coefficients = band_coefficients(equal_edges(bands), len(moments))
    return np.asarray(coefficients @ moments / moments[0])
