"""Spectral, graph-based filtering of sharded gradients for DeepSpeed ZeRO."""

from spectral_ds.attach import attach, initialize, plugin_of
from spectral_ds.config import SpectralConfig, load_config
from spectral_ds.config_sources import SpectralConfigError
from spectral_ds.engines import UnsupportedEngineError
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.plugin import SpectralPlugin

__version__ = "0.1.0"

__all__ = [
    "ParameterGraph",
    "SpectralConfig",
    "SpectralConfigError",
    "SpectralPlugin",
    "UnsupportedEngineError",
    "attach",
    "initialize",
    "load_config",
    "plugin_of",
]
