"""`spectral-ds plan`: what a configuration takes of each rank, from a model's shapes alone.

In the order in which they are needed: `command` reads the arguments and has the plan made;
`models` gives the shapes; `report` puts the plan into plain numbers, with `advice` on what to
change; `tables` prints them.
"""

from spectral_ds.cli.plan.command import add_parser

__all__ = ["add_parser"]
