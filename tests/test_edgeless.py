"""A graph that joins nothing, or hardly anything, is a warning that says why."""

import logging

import pytest
import torch
from torch import nn

import spectral_ds

QUIET = {"monitor": {"enabled": False}}


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7))

    def forward(self):
        return self.a.square().sum() + self.b.square().sum()


EDGELESS = {
    "similarity": "compares rows of a matrix, and none has two",
    "ring": "joins rows of a matrix, and none has two",
    "depth": "in several blocks, and there are none",
    "pair": "which it knows by their names, and there are none",
}


def warnings_of(caplog):
    return [r.message for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("family", EDGELESS)
def test_a_graph_without_edges_is_a_warning_that_says_why_once(caplog, family):
    section = {"graph": {"edges": [{"family": family}], "refresh_interval": 1}, **QUIET}
    model = Vectors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spectral_ds.attach(model, optimizer, section)
    for _ in range(3):  # it is built again at each
        model().backward()
        optimizer.step()
    [warning] = [text for text in warnings_of(caplog) if "edges reach" in text]
    assert warning.startswith("spectral_ds.graph: 0 edges reach 0 of the 12 elements")
    assert EDGELESS[family] in warning


def test_a_graph_with_hardly_an_edge_is_a_warning_of_its_own_graph(caplog):
    model = nn.ModuleDict({"wide": nn.Linear(2000, 1), "small": nn.Linear(1, 2)})
    graphs = [{"edges": [{"family": "ring"}], "node": node} for node in ("row", "column")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spectral_ds.attach(model, optimizer, {"graphs": graphs, **QUIET})
    [warning] = [text for text in warnings_of(caplog) if "edges reach" in text]
    assert warning.startswith("spectral_ds.graphs[0]: 1 edges reach 2 of the 2,005 elements")
    assert "few have two" in warning


@pytest.mark.parametrize(
    "section",
    [
        {"preset": "grokfast"},  # no graph acts
        {"filter": {"response": "identity"}},
        # Without a gradient there is no edge yet.
        {"graph": {"edges": [{"family": "similarity", "features": "gradient"}],
                   "refresh_interval": 2}},
    ],
)  # fmt: skip
def test_there_is_no_such_warning_where_no_edge_is_missed(caplog, section):
    model = Vectors()
    spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), {**section, **QUIET})
    assert not [text for text in warnings_of(caplog) if "edges reach" in text]


def test_similarity_of_weights_that_are_zero_is_told(caplog):
    model = nn.Linear(4, 6, bias=False)
    nn.init.zeros_(model.weight)
    spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), QUIET)
    [warning] = [text for text in warnings_of(caplog) if "edges reach" in text]
    assert "weights may be zero" in warning
