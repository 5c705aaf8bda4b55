"""`spectral-ds inspect`: graph and spectrum of a model's parameters, and which graph is worth it.

In the order in which they are needed: `command` reads the arguments; `model_under_test` holds the
model and builds its graphs; `graph_properties` measures a graph, with `group_spectrum` for its
eigenvalues; `batches` and `gradients` give what signal and noise are measured on; `candidates`
compares graphs by them; `activity` measures graphs of activations, of the inputs that
`activity_sources` gives; `inspection` calls all of these; `report` is what was found, which
`tables` prints and `plots` and `activity_plot` draw.
"""

from spectral_ds.cli.inspect.command import add_parser

__all__ = ["add_parser"]
