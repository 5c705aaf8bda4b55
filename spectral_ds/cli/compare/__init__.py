"""Comparing: does it help? Methods of training side by side, and what their differences are worth.

settings → jobs → pool of processes → job: run, after, material → results → inference → report.
"""

from spectral_ds.cli.compare.command import add_parser

__all__ = ["add_parser"]
