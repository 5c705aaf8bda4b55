"""Whether a filter on a graph separates signal from noise."""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

# Less of the noise than this share, relative to the largest gain, counts as this much.
LEAST_NOISE_KEPT = 1e-3


def kept_over_total(signal: Values, noise: Values, gains: Values) -> float:
    """SNR of what gains keep over the SNR of all; in a random basis it is 1.

    A random basis spreads signal and noise over its frequencies alike, so that no gains change
    their ratio.

    Args:
        signal, noise: (bands,): power; estimates, which may come out negative, count as 0 then.
        gains: (bands,): h_b.

    Returns:
        The ratio, at most 1 / LEAST_NOISE_KEPT: where hardly any noise is kept, it is at least
        that large. 1 if there is no signal or no noise to compare, or nothing is kept.
    """
    signal, noise = np.maximum(signal, 0), np.maximum(noise, 0)
    energy = np.square(gains)
    if min(signal.sum(), noise.sum(), energy.max()) <= 0:
        return 1.0
    energy = energy / energy.max()
    of_signal, of_noise = float(energy @ signal / signal.sum()), float(energy @ noise / noise.sum())
    if of_signal == of_noise == 0:
        return 1.0
    return of_signal / max(of_noise, LEAST_NOISE_KEPT)
