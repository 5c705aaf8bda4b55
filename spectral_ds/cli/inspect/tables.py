"""What `spectral-ds inspect` has found, as tables on the terminal."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table

from spectral_ds.cli.inspect.activity import ActivityReport
from spectral_ds.cli.inspect.candidates import CandidateResult
from spectral_ds.cli.inspect.graph_properties import GraphProperties
from spectral_ds.cli.inspect.report import GraphReport, InspectReport
from spectral_ds.cli.terminal import make_console, make_table
from spectral_ds.monitor.figures import shortened

BARS = " ▁▂▃▄▅▆▇█"
# Bins of the density of states as it fits into a column.
COARSE = 16


def show(report: InspectReport, written: Sequence[Path]) -> None:
    """Print what was found."""
    console = make_console()
    print_ = partial(console.print, soft_wrap=True)
    print_(
        f"{report.model}: {report.parameters} trainable parameters, {report.elements:,} "
        f"elements; {report.seconds:.0f} s"
    )
    for graph in report.graphs:
        console.print(_graph_table(graph))
        for dimensions in sorted(set(graph.dimensions.values())):
            roles = [role for role, theirs in graph.dimensions.items() if theirs == dimensions]
            print_(f"stored as {dimensions}; a row is one output: {', '.join(roles)}")
    if report.graphs:
        _explain_graphs(print_)
    for activity in report.activity:
        console.print(_activity_table(activity))
    if report.activity:
        print_(
            "a: activity of a direction of a layer's inputs, 1 is average. 50 %, 90 %: how many "
            "directions hold so much of all activity.\nalong: share of the gradient's energy along "
            "the most active directions (by chance: of one that points anywhere)."
        )
    if report.activity_words is not None:
        print_(f"\n{report.activity_words}.\n")
    if report.candidates is not None and report.recommendation is not None:
        print_()
        console.print(_candidate_table(report.candidates))
        print_(
            "signal, noise, SNR: in the lowest eighth of the frequencies; a random basis keeps "
            "1.00. cosine: of a batch's gradient\nwith the true one, unfiltered → by the best "
            "response. Measured on parameters with edges. A better gradient need not train better."
        )
        print_(f"\nRecommendation: {report.recommendation.words}.\n")
        print_(report.recommendation.yaml)
    if written:
        print_("written: " + ", ".join(str(path) for path in written))


def _explain_graphs(print_: Callable[..., None]) -> None:
    print_(
        "degree: least, median, mean, most. λ₁: the lowest eigenvalues above 0. density: of "
        "eigenvalues over [0, bound].\nroughness: xᵀLx/xᵀx of the weights over that of random "
        "directions; below 1 is smoother than chance."
    )


def _activity_table(report: ActivityReport) -> Table:
    along = [f"along {k} (by chance)" for k in report.directions]
    table = make_table(
        f"activity of {report.name}",
        ("matrices of equal inputs", "inputs", "graphs", "largest a", "50 %", "90 %", *along),
    )
    names, _ = shortened([name for role in report.roles for name in role.roles])
    rest = iter(names)
    for role in report.roles:
        known, held = len(role.eigenvalues), (role.holding_half, role.holding_most)
        table.add_row(
            ", ".join(itertools.islice(rest, len(role.roles))),
            f"{role.inputs:,}",
            f"{role.graphs:,}",
            f"{role.eigenvalues[0]:.3g}",
            *(f"> {known}" if n is None else str(n) for n in held),
            *_along(role.gradient, role.by_chance),
        )
    if report.gradient is not None and report.by_chance is not None:
        table.add_section()
        table.add_row("all", "", "", "", "", "", *_along(report.gradient, report.by_chance))
    return table


def _along(shares: Sequence[float] | None, by_chance: Sequence[float]) -> list[str]:
    if shares is None:
        return [f"– ({percent(chance)})" for chance in by_chance]
    pairs = zip(shares, by_chance, strict=True)
    return [f"{percent(share)} ({percent(chance)})" for share, chance in pairs]


def _graph_table(graph: GraphReport) -> Table:
    bound = graph.whole.lambda_max_bound
    table = make_table(
        f"{graph.name}: nodes are {graph.node}s; {graph.laplacian} Laplacian, eigenvalues in "
        f"[0, {bound:.4g}]",
        ("", "nodes", "edges", "components", "degree", "λ_max", "λ₁ ...", "density", "roughness"),
    )
    table.add_row("all", *_cells(graph.whole))
    if len(graph.families) > 1:
        table.add_section()
        for family, properties in graph.families.items():
            table.add_row(family, *_cells(properties))
    table.add_section()
    alone = [properties.nodes for properties in graph.roles.values() if properties.edges == 0]
    for role, properties in graph.roles.items():
        if properties.edges > 0:
            table.add_row(role, *_cells(properties))
    if alone:
        table.add_row(f"{len(alone)} roles without edges", f"{sum(alone):,}")
    return table


def _cells(properties: GraphProperties) -> list[str]:
    degree = properties.degree
    lowest = properties.lowest_eigenvalues
    return [
        f"{properties.nodes:,}",
        f"{properties.edges:,}",
        f"{properties.components:,}",
        " ".join(f"{v:.3g}" for v in (degree.min, degree.median, degree.mean, degree.max)),
        f"{properties.lambda_max:.4g}",
        "not converged" if lowest is None else " ".join(f"{v:.3g}" for v in lowest[:2]) or "–",
        sparkline(properties.density),
        number(properties.roughness.ratio),
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


def _cosines(result: CandidateResult) -> str:
    """Cosine with the true gradient, without a filter and with the best response."""
    if result.kept_over_total is None:
        return number(None)
    return f"{result.unfiltered:.3f} → {result.filtered:.3f}"


def _candidate_table(results: Sequence[CandidateResult]) -> Table:
    samples = max(result.samples for result in results)
    table = make_table(
        f"signal and noise of {samples} gradients on candidate graphs",
        ("graph", "", "edges", "signal", "noise", "SNR kept/total", "cosine"),
        words=2,
    )
    for result in results:
        table.add_row(
            result.name,
            result.judgement,
            f"{result.edges:,}",
            percent(result.signal_kept),
            percent(result.noise_kept),
            number(result.kept_over_total),
            _cosines(result),
        )
    return table
