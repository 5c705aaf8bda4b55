"""Ways in: by hand, for a script that knows nothing of the package, in the Hugging Face Trainer."""

from spectral_ds.attach.initialize import attach, check_section, initialize, plugin_of, plugins_of

__all__ = ["attach", "check_section", "initialize", "plugin_of", "plugins_of"]
