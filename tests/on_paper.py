"""Models of transformers without weights."""

import torch

from spectral_ds.stack import facts_of


def on_paper(kind, **settings):
    """(shapes, facts) of a model of transformers; no weight is made."""
    with torch.device("meta"):
        model = kind(kind.config_class(**settings))
    named = dict(model.named_parameters())
    return {n: tuple(p.shape) for n, p in named.items()}, facts_of([model], named)
