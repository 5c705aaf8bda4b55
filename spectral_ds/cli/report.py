"""Tables on the terminal."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from spectral_ds.cli.candidates import Verdict
from spectral_ds.cli.inspection import Facts
from spectral_ds.cli.summary import GraphSummary, Summary

# Narrower terminals fold names; what is no terminal gets all of it.
WIDTH = 160
BARS = " ▁▂▃▄▅▆▇█"
# Bins of the density of states as it fits into a column.
COARSE = 16


def make_console() -> Console:
    """Plain text: names may hold brackets, which are no markup."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=WIDTH)
    return console


def make_table(title: str, columns: Sequence[str], words: int = 1) -> Table:
    """A table whose first columns hold words, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        is_word = index < words
        table.add_column(
            column,
            justify="left" if is_word else "right",
            overflow="fold",
            no_wrap=not is_word,
        )
    return table


def show(summary: Summary, written: Sequence[Path]) -> None:
    """Print what was found."""
    console = make_console()
    print_ = partial(console.print, soft_wrap=True)
    print_(
        f"{summary.model}: {summary.parameters} trainable parameters, {summary.elements:,} "
        f"elements; {summary.seconds:.0f} s"
    )
    for graph in summary.graphs:
        console.print(_graph_table(graph))
    print_(
        "degree: least, median, mean, most. λ₁: the lowest eigenvalues above 0. density: of "
        "eigenvalues over [0, bound].\nroughness: xᵀLx/xᵀx of the weights over that of random "
        "directions; below 1 is smoother than chance."
    )
    if summary.candidates is not None and summary.recommendation is not None:
        print_()
        console.print(_candidate_table(summary.candidates))
        print_(
            "signal, noise, SNR: in the lowest eighth of the frequencies; a random basis keeps "
            "1.00. cosine: of a batch's gradient\nwith the true one, unfiltered → by the best "
            "response. Measured on parameters with edges. A better gradient need not train better."
        )
        print_(f"\nRecommendation: {summary.recommendation.words}.\n")
        print_(summary.recommendation.yaml)
    if written:
        print_("written: " + ", ".join(str(path) for path in written))


def _graph_table(graph: GraphSummary) -> Table:
    bound = graph.whole.lambda_max_bound
    table = make_table(
        f"{graph.name}: nodes are {graph.node}s; {graph.laplacian} Laplacian, eigenvalues in "
        f"[0, {bound:.4g}]",
        ("", "nodes", "edges", "components", "degree", "λ_max", "λ₁ ...", "density", "roughness"),
    )
    table.add_row("all", *_cells(graph.whole))
    if len(graph.families) > 1:
        table.add_section()
        for family, facts in graph.families.items():
            table.add_row(family, *_cells(facts))
    table.add_section()
    alone = [facts.nodes for facts in graph.roles.values() if facts.edges == 0]
    for role, facts in graph.roles.items():
        if facts.edges > 0:
            table.add_row(role, *_cells(facts))
    if alone:
        table.add_row(f"{len(alone)} roles without edges", f"{sum(alone):,}")
    return table


def _cells(facts: Facts) -> list[str]:
    degree = facts.degree
    lowest = facts.lowest_eigenvalues
    return [
        f"{facts.nodes:,}",
        f"{facts.edges:,}",
        f"{facts.components:,}",
        " ".join(f"{v:.3g}" for v in (degree.min, degree.median, degree.mean, degree.max)),
        f"{facts.lambda_max:.4g}",
        "not converged" if lowest is None else " ".join(f"{v:.3g}" for v in lowest[:2]) or "–",
        sparkline(facts.density),
        number(facts.roughness.ratio),
    ]


def sparkline(shares: Sequence[float]) -> str:
    """Shares of equal bins as bars; a bin that holds anything shows something."""
    coarse = np.array(shares).reshape(COARSE, -1).sum(axis=1)
    height = np.ceil(coarse / max(coarse.max(), 1e-300) * (len(BARS) - 1) - 1e-9).astype(int)
    return "".join(BARS[level] for level in height)


def number(value: float | None) -> str:
    """Two decimals; a dash for what is not known."""
    return "–" if value is None else f"{value:.2f}"


def percent(share: float | None) -> str:
    """A whole number; a dash for what is not known."""
    return "–" if share is None else f"{100 * share:.0f} %"


def _cosines(verdict: Verdict) -> str:
    """Without a filter and with the best response."""
    if verdict.kept_over_total is None:
        return number(None)
    return f"{verdict.unfiltered:.3f} → {verdict.filtered:.3f}"


def _candidate_table(verdicts: Sequence[Verdict]) -> Table:
    samples = max(verdict.samples for verdict in verdicts)
    table = make_table(
        f"signal and noise of {samples} gradients on candidate graphs",
        ("graph", "", "edges", "signal", "noise", "SNR kept/total", "cosine"),
        words=2,
    )
    for verdict in verdicts:
        table.add_row(
            verdict.name,
            verdict.judgement,
            f"{verdict.edges:,}",
            percent(verdict.signal_kept),
            percent(verdict.noise_kept),
            number(verdict.kept_over_total),
            _cosines(verdict),
        )
    return table
