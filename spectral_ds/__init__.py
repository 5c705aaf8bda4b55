"""Spectral, graph-based filtering of sharded gradients for DeepSpeed ZeRO and PyTorch FSDP2."""

from typing import TYPE_CHECKING, Any

from spectral_ds.attach import attach, initialize, plugin_of
from spectral_ds.config import SpectralConfig, SpectralConfigError, load_config
from spectral_ds.engines import UnsupportedEngineError
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.plugin import SpectralPlugin

if TYPE_CHECKING:
    from spectral_ds.attach.callback import SpectralCallback

__version__ = "0.1.0"

__all__ = [
    "ParameterGraph",
    "SpectralCallback",
    "SpectralConfig",
    "SpectralConfigError",
    "SpectralPlugin",
    "UnsupportedEngineError",
    "attach",
    "initialize",
    "load_config",
    "plugin_of",
]


def __getattr__(name: str) -> Any:
    if name == "SpectralCallback":  # imports transformers, which others do not need
        from spectral_ds.attach.callback import SpectralCallback

        return SpectralCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
