"""One plain sentence on whether the graph is worth filtering on."""

import numpy as np
import numpy.typing as npt

from spectral_ds.spectrum import kept_over_total

Values = npt.NDArray[np.float64]

# Samples of the gradient before anything is said.
ENOUGH_SAMPLES = 20
# SNR of what is kept over total SNR, from which on the graph separates, and barely does.
SEPARATES, BARELY = 1.5, 1.1


def verdict(signal: Values, noise: Values, gains: Values) -> str:
    """What the estimates say.

    Args:
        signal, noise: (bands,): power per equal band of frequency, lowest first.
        gains: (bands,): the response there; if all are alike, the lowest eighth of the frequencies
            is judged, which a low-pass filter would keep.
    """
    what = "what the filter keeps holds"
    if np.ptp(gains) == 0:
        gains = (np.arange(len(gains)) < max(1, len(gains) // 8)).astype(np.float64)
        what = "the lowest frequencies hold"
    total_signal, total_noise = np.maximum(signal, 0).sum(), np.maximum(noise, 0).sum()
    if total_signal == 0 or total_noise == 0:
        return "the gradient is too noisy to tell signal from noise on this graph yet"
    ratio = kept_over_total(signal, noise, gains)
    energy = np.square(gains)
    powers = np.maximum(signal, 0), np.maximum(noise, 0)
    kept = [100 * float(energy @ power / power.sum()) for power in powers]
    judgement = "does not separate signal from noise"
    if ratio >= BARELY:
        judgement = "barely separates signal from noise"
    if ratio >= SEPARATES:
        judgement = "separates signal from noise"
    return (
        f"this graph {judgement} on this model: {what} {kept[0]:.0f} % of the gradient's "
        f"signal and {kept[1]:.0f} % of its noise, a signal-to-noise ratio {ratio:.2f} times the "
        "total (a random basis gives 1.00)"
    )
