"""A plan as tables on the terminal."""

from typing import Any

from rich.table import Table

from spectral_ds.cli.terminal import duration, make_console, make_table, size


def show(report: dict[str, Any]) -> None:
    """Print the report of a plan."""
    console = make_console()
    ranks, machines = (
        f"{count:,} {of}{'' if count == 1 else 's'}"
        for count, of in ((report["world_size"], "rank"), (report["nodes"], "machine"))
    )
    console.print(
        f"{report['model']}: {report['parameters']:,} parameters; {report['engine']}, "
        f"{ranks} on {machines}"
    )
    for graph in report["graphs"]:
        if graph.get("family") == "activations":
            console.print(f"\n{_words_of_activations(graph)}", soft_wrap=True)
            console.print(_groups_table(graph["groups"], "matrices of equal inputs"))
            continue
        edges, hops = graph["edges"], graph["hops"]
        is_known = edges["least"] == edges["most"]
        range_ = "" if is_known else f" (expected; {edges['least']:,} to {edges['most']:,})"
        regularizer = "" if hops["regularizer"] is None else f" and {hops['regularizer']} more"
        products = "no" if hops["filter"] is None else hops["filter"]
        console.print(
            f"\n{graph['nodes']:,} nodes, {edges['expected']:,} edges{range_}; {products} "
            f"products with L{regularizer} a step",
            soft_wrap=True,
        )
        console.print(_groups_table(graph["groups"]))
    console.print(_ranks_table(report["per_rank"]))
    console.print(
        f"all ranks send {size(report['bytes_per_step'])} a step in at most "
        f"{report['collectives_per_step']:,} collectives; {report['not_counted']} is not counted",
        soft_wrap=True,
    )
    console.print(f"\n{report['advice']}", soft_wrap=True)


def _words_of_activations(graph: dict[str, Any]) -> str:
    count, learn = graph["graphs"], graph["learn"]
    learned = "" if learn == "none" else f", learn {learn}"
    others = count["most"] - count["expected"]
    known = f" by names; {count['most']:,} if no two matrices share their inputs" if others else ""
    return (
        f"{graph['nodes']:,} inputs of layers in {count['expected']:,} graphs of activations"
        f"{known}; the {graph['directions']} most active directions of each (keep {graph['keep']}"
        f"{learned})"
    )


def _groups_table(groups: list[dict[str, Any]], first: str = "joined parameters") -> Table:
    table = make_table("", (first, "meet by", "groups", "sent a step"), words=2)
    alone = [group for group in groups if group["meets"] == "local"]
    for group in groups:
        if group["meets"] != "local":
            roles = ", ".join(group["roles"])
            table.add_row(
                roles, group["meets"], f"{group['count']:,}", size(group["bytes_per_step"])
            )
    if alone:
        roles = ", ".join(dict.fromkeys(role for group in alone for role in group["roles"]))
        table.add_row(roles, "local", f"{sum(group['count'] for group in alone):,}", "0 B")
    return table


def _ranks_table(figures: dict[str, Any]) -> Table:
    table = make_table("", ("of a rank", "", "mean", "worst"), words=2)

    def add(part: str, name: str, both: dict[str, float], show: Any) -> None:
        table.add_row(part, name, show(both["mean"]), show(both["worst"]))

    def whole(count: float) -> str:
        return f"{count:,.0f}"

    for name in ("elements", "nodes", "edges"):
        if name != "edges" or figures[name]["worst"]:  # pairs of inputs are not stored
            add("graph", name, figures[name], whole)
    parts = {
        "device memory": ("device_bytes", size),
        "host memory": ("host_bytes", size),
        "boundary, a product": ("boundary_bytes_per_hop", size),
        "transpose, one way": ("transposed_bytes_per_move", size),
        "sent a step": ("bytes_per_step", size),
    }
    for part, (key, show) in parts.items():
        table.add_section()
        shown = {name: both for name, both in figures[key].items() if both["worst"]}
        for name, both in (shown or {"total": figures[key]["total"]}).items():
            add(part, name.replace("_", " "), both, show)
    if held := figures["calibration_bytes"]:
        table.add_section()
        table.add_row("device memory", "while looking at activations", size(held), size(held))
    table.add_section()
    add("a step", "operations", figures["flops_per_step"], lambda n: size(n).removesuffix("B"))
    add("a step", "memory traffic", figures["traffic_bytes_per_step"], size)
    for name, both in figures["seconds"].items():
        add("time", name, both, duration)
    return table
