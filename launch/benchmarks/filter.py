"""Times filters on one rank beside what they are to be compared with.

In:  a model's shapes and how many of its blocks, with random weights and gradients.
Out: medians in milliseconds, the filter's time over that of copying the gradient (the least that
     anything takes that changes it), how much longer Muon's orthogonalization takes, and the
     bandwidth of memory that the plan says a filter needs, of what copying reaches.

    python launch/benchmarks/filter.py [--model llama-3-8b] [--blocks 10] [--threads 2]
        [--device cuda] [--json FILE]
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from models import MODELS, SMALLEST, make_model
from peers import COPY, MUON, Actions, Tensors, peers
from sheet import Sheet, spread
from timing import Times, in_turns, ready, said

from spectral_ds.config import load_config
from spectral_ds.engines import engine_for
from spectral_ds.geometry.buckets import bucket_elements
from spectral_ds.planning import Cluster, Machine, Model, plan_configuration
from spectral_ds.stack import Stack

FLOAT = 4  # bytes
# Tokens that activations are looked at by: their number changes nothing of a filter's cost.
LOOK = {"samples": 2, "length": 32}


def similarity(neighbours: int, order: int, node: str, kernel: str = "best") -> dict[str, Any]:
    """A filter on edges of similarity, of a Chebyshev order."""
    return {
        "graph": {"node": node, "edges": [{"family": "similarity", "neighbours": neighbours}]},
        "filter": {"response": "heat", "order": order},
        "operator": {"kernel": kernel},
    }


def activations(rank: int) -> dict[str, Any]:
    """A filter on the most active directions."""
    return {
        "graph": {
            "node": "column",
            "edges": [{"family": "activations", "rank": rank, **LOOK}],
        },
        "filter": {"response": "tikhonov"},
    }


DEPTH = {"graph": {"edges": [{"family": "depth"}]}}
FILTERS: dict[str, dict[str, Any]] = {
    "depth, window": {**DEPTH, "filter": {"response": "window"}},
    "depth, heat": {**DEPTH, "filter": {"response": "heat"}},
    **{
        f"similarity of {node}s, {neighbours} neighbours, order {order}": similarity(
            neighbours, order, node
        )
        for node in ("row", "column")
        for neighbours, order in ((4, 3), (8, 1), (8, 2), (8, 3), (8, 5), (8, 8), (16, 3))
    },
    **{
        f"similarity of rows, one hop, {kernel}": similarity(8, 1, "row", kernel)
        for kernel in ("torch_csr", "torch_sparse", "embedding_bag")
    },
    **{f"co-activation, rank {rank}": activations(rank) for rank in (32, 64, 256)},
}


class Bench:
    """Filters on one model, whose gradients are random.

    Args:
        name: of the model.
        blocks: how many it has here; with few words, since embeddings are not filtered.
    """

    def __init__(self, name: str, blocks: int, device: torch.device) -> None:
        self._device = device
        model = make_model(name, device, num_hidden_layers=blocks, vocab_size=512)
        self._model = model
        self._engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0))
        fragments = self._engine.fragments
        self._gradients = [torch.randn(each.length, device=device) for each in fragments]
        self._filtered = [gradient.clone() for gradient in self._gradients]
        shapes = [self._engine.shapes[each.parameter] for each in fragments]
        self.matrices: Tensors = [
            gradient.view(own)
            for gradient, own, each in zip(self._gradients, shapes, fragments, strict=True)
            if len(own) == 2 and "layers" in each.parameter
        ]

    @property
    def elements(self) -> int:
        """Of the matrices that are filtered."""
        return sum(matrix.numel() for matrix in self.matrices)

    def filter(self, section: dict[str, Any]) -> tuple[functools.partial[None], float]:
        """A filter of the gradients, and the seconds that making it took."""
        started = ready(self._device)
        stack = Stack(self._engine, load_config(section))
        seconds = ready(self._device) - started
        signal = stack.only_filtered(self._filtered)
        return functools.partial(stack.filter.apply, signal, 0), seconds

    def renew(self) -> None:
        """Set what is filtered to the gradients: filters leave less and less of it."""
        torch._foreach_copy_(self._filtered, self._gradients)

    def traffic(self, section: dict[str, Any]) -> float:
        """Bytes that the plan says one filtering reads and writes."""
        plan = plan_configuration(
            Model.of("benchmark", self._model),
            load_config(section),
            "zero2",
            Cluster(1, 1),
            Machine(),
            bucket_elements(self._device),
        )
        return float(plan.cost.traffic[0])


def row_of(label: str, times: dict[str, Times], build: float | None, passes: float | None) -> Any:
    """One of the table.

    Args:
        build: seconds that making the filter took.
        passes: what the plan says a filter reads and writes, in units of what copying does.
    """
    own, copy, muon = times[label], times[COPY], times[MUON]
    over = None if own.error else own.over(copy)
    return {
        "": label,
        "ms": own.error or own.median,
        "over copying": spread(over),
        "Muon over it": None if own.error or muon.error else muon.over(own)[0],
        "bandwidth": f"{100 * passes / over[0]:.0f} %" if over and passes else None,
        "build s": build,
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=SMALLEST)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="filters whose names have one")
    parser.add_argument(
        "--whole-steps", action="store_true", help="time those of Muon and SOAP too: slow on a CPU"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    """Measures everything in one run and prints the table."""
    arguments = parse_arguments()
    device, name = arguments.device, arguments.model
    torch.set_num_threads(arguments.threads)
    bench = Bench(name, arguments.blocks, device)
    actions, missing = peers(bench.matrices, arguments.whole_steps)
    wanted = {
        label: section
        for label, section in FILTERS.items()
        if not arguments.only or any(word in label for word in arguments.only)
    }
    filters: Actions = {}
    built: dict[str, float] = {}
    passes: dict[str, float] = {}
    for label, section in wanted.items():
        try:
            filters[label], built[label] = bench.filter(section)
            passes[label] = bench.traffic(section) / (2 * FLOAT * bench.elements)
        except Exception as error:  # the others are measured all the same
            missing[label] = said(error)
    times = in_turns({**actions, **filters}, device, arguments.rounds, bench.renew)
    times |= {label: Times((), reason) for label, reason in missing.items()}
    sheet = Sheet(
        "filter",
        device,
        f"{bench.elements / 1e6:.1f} M elements, {arguments.blocks} blocks of {name}, fp32",
    )
    sheet.add(
        "What the filter takes on one rank",
        [row_of(label, times, built.get(label), passes.get(label)) for label in times],
    )
    sheet.close(arguments.json)


if __name__ == "__main__":
    main()
