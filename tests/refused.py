"""What a section of the configuration is refused with."""

import pytest

from spectral_ds.config import SpectralConfigError, load_config


def message_of(section: object) -> str:
    with pytest.raises(SpectralConfigError) as caught:
        load_config(section)  # type: ignore[arg-type]
    return str(caught.value)
