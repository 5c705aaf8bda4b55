"""Where a signal's energy lies in frequency, by the kernel polynomial method."""

from spectral_ds.spectrum.bands import band_energies
from spectral_ds.spectrum.moments import chebyshev_moments, squared_norm

__all__ = ["band_energies", "chebyshev_moments", "squared_norm"]
