"""Whether a filter on a graph separates signal from noise."""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def kept_over_total(signal: Values, noise: Values, gains: Values) -> float:
    """SNR of what gains keep over the SNR of all; in a random basis it is 1.

    A random basis spreads signal and noise over its frequencies alike, so that no gains change
    their ratio.

    Args:
        signal, noise: (bands,): power; estimates, which may come out negative, count as 0 then.
        gains: (bands,): h_b.

    Returns:
        The ratio; 1 if there is no signal or no noise to compare.
    """
    signal, noise, energy = np.maximum(signal, 0), np.maximum(noise, 0), np.square(gains)
    kept_signal, kept_noise = float(energy @ signal), float(energy @ noise)
    if min(kept_signal, kept_noise) <= 0:
        return 1.0
    return kept_signal / kept_noise * float(noise.sum() / signal.sum())
