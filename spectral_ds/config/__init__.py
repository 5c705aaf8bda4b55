"""Everything a user can set, where it comes from, and the presets."""

from spectral_ds.config.loading import load_config
from spectral_ds.config.schema import (
    ADAPTIVE,
    KEEP,
    LEARN,
    PRESETS,
    RESPONSES,
    CheckpointConfig,
    EdgeConfig,
    ExchangeName,
    FilterConfig,
    GraphConfig,
    KernelName,
    MonitorConfig,
    Node,
    OperatorConfig,
    RegularizerConfig,
    SpectralConfig,
    StatisticsConfig,
    TemporalConfig,
)
from spectral_ds.config.sources import SECTION, SpectralConfigError, read_json

__all__ = [
    "ADAPTIVE",
    "KEEP",
    "LEARN",
    "PRESETS",
    "RESPONSES",
    "SECTION",
    "CheckpointConfig",
    "EdgeConfig",
    "ExchangeName",
    "FilterConfig",
    "GraphConfig",
    "KernelName",
    "MonitorConfig",
    "Node",
    "OperatorConfig",
    "RegularizerConfig",
    "SpectralConfig",
    "SpectralConfigError",
    "StatisticsConfig",
    "TemporalConfig",
    "load_config",
    "read_json",
]
