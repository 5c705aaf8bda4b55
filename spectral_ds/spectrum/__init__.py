"""Where a signal's energy lies in frequency, and where a graph's eigenvalues do."""

from spectral_ds.spectrum.bands import (
    COEFFICIENTS_PER_BAND,
    band_coefficients,
    band_energies,
    equal_edges,
)
from spectral_ds.spectrum.density import Density, density_of_states
from spectral_ds.spectrum.eigenpairs import Eigenpairs, lowest_eigenpairs
from spectral_ds.spectrum.moments import chebyshev_moments, squared_norm
from spectral_ds.spectrum.roughness import roughness
from spectral_ds.spectrum.running import RunningSketch
from spectral_ds.spectrum.separation import LEAST_NOISE_KEPT, kept_over_total
from spectral_ds.spectrum.spectrometer import Spectrometer
from spectral_ds.spectrum.statistics import GradientStatistics, SignalAndNoise, SignalToNoise

__all__ = [
    "COEFFICIENTS_PER_BAND",
    "LEAST_NOISE_KEPT",
    "Density",
    "Eigenpairs",
    "GradientStatistics",
    "RunningSketch",
    "SignalAndNoise",
    "SignalToNoise",
    "Spectrometer",
    "band_coefficients",
    "band_energies",
    "chebyshev_moments",
    "density_of_states",
    "equal_edges",
    "kept_over_total",
    "lowest_eigenpairs",
    "roughness",
    "squared_norm",
]
