"""One plain sentence on whether the graph is worth filtering on."""

import numpy as np
import numpy.typing as npt

from spectral_ds.spectrum import LEAST_NOISE_KEPT, kept_over_total

Values = npt.NDArray[np.float64]

# Samples of the gradient before anything is said; fewer where the graph does not live as long.
ENOUGH_SAMPLES, FEWEST_SAMPLES = 20, 2
# SNR of what is kept over total SNR, from which on the graph separates, and barely does.
SEPARATES, BARELY = 1.5, 1.1
# Standard errors by which a graph must separate better than chance: it is asked again and again.
LEAST_ERRORS = 4.0
TOO_NOISY = "the gradient is too noisy to tell signal from noise on this graph yet"


def judged_gains(gains: Values) -> Values:
    """The gains of the response; if all are alike, of a low-pass filter of the lowest eighth."""
    if np.ptp(gains) > 0:
        return gains
    return (np.arange(len(gains)) < max(1, len(gains) // 8)).astype(np.float64)


def verdict(signal: Values, noise: Values, gains: Values, error: Values | float = 0.0) -> str:
    """What the estimates say.

    Args:
        signal, noise: (bands,): power per equal band of frequency, lowest first.
        gains: (bands,): the response there; see `judged_gains`.
        error: (bands,): standard error of signal; 0 if it is not known.
    """
    is_alike = np.ptp(gains) == 0
    what = "the lowest frequencies hold" if is_alike else "what the filter keeps holds"
    gains = judged_gains(gains)
    total_signal, total_noise = np.maximum(signal, 0).sum(), np.maximum(noise, 0).sum()
    if total_signal == 0 or total_noise == 0:
        return TOO_NOISY
    ratio = kept_over_total(signal, noise, gains)
    energy = np.square(gains)
    energy /= max(1.0, energy.max())  # of a response that amplifies
    powers = np.maximum(signal, 0), np.maximum(noise, 0)
    kept = [100 * float(energy @ power / power.sum()) for power in powers]
    is_bound = energy @ powers[1] < LEAST_NOISE_KEPT * energy.max() * total_noise
    times = f"at least {ratio:.2f}" if is_bound and kept[0] > 0 else f"{ratio:.2f}"
    # What is kept of the signal, less what a random basis would keep; 0 on average if it is one.
    beyond_chance = energy - energy @ powers[1] / total_noise
    chance = LEAST_ERRORS * np.linalg.norm(beyond_chance * error)
    if ratio >= BARELY and beyond_chance @ signal < chance:
        return TOO_NOISY
    judgement = "does not separate signal from noise"
    if ratio >= BARELY:
        judgement = "barely separates signal from noise"
    if ratio >= SEPARATES:
        judgement = "separates signal from noise"
    return (
        f"this graph {judgement} on this model: {what} {kept[0]:.0f} % of the gradient's "
        f"signal and {kept[1]:.0f} % of its noise, a signal-to-noise ratio {times} times the "
        "total (a random basis gives 1.00)"
    )
