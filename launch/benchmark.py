"""Times the filter on one rank beside what it is to be compared with, and prints the ratios.

In:  --blocks N of SmolLM2-135M's shapes (10: 35 million elements, random values), --threads,
     --device.
Out: medians in milliseconds, and each filter's time over that of copying the gradient shard and of
     Muon's orthogonalization (5 Newton-Schulz steps) of the same matrices.

    python launch/benchmark.py [--blocks 10] [--threads 2] [--device cpu]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

from spectral_ds.filters import FixedTransfer, GraphFilter, Heat, Response, Window
from spectral_ds.geometry.buckets import bucket_elements
from spectral_ds.graph import Depth, EdgeFamily, ParameterNodes, Similarity
from spectral_ds.laplacian import KernelName, ParameterGraph, Work, plan_operators
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches import WeightFeatures

BLOCK = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}

COPY, MUON = "copy of the gradient shard", "Muon, 5 Newton-Schulz steps"
FILTERS: list[tuple[str, EdgeFamily, Response, int | str, KernelName]] = [
    ("depth, window, exact", Depth(), Window(0.4), "best", "best"),
    ("depth, heat, exact", Depth(), Heat(1.0), "best", "best"),
    ("similarity, heat, order 3", Similarity(), Heat(1.0), 3, "best"),
    ("similarity of columns, heat, order 3", Similarity(), Heat(1.0), 3, "best"),
    ("similarity, one hop, torch_csr", Similarity(), Window(0.4), 1, "torch_csr"),
    ("similarity, one hop, torch_sparse", Similarity(), Window(0.4), 1, "torch_sparse"),
]

Tensors = list[torch.Tensor]


def make_filter(
    parameters: list[ParameterNodes],
    weights: Tensors,
    family: EdgeFamily,
    response: Response,
    order: int | str,
    kernel: KernelName,
    device: torch.device,
) -> tuple[GraphFilter, float]:
    """The filter of one rank that owns everything, and the seconds that building it took."""
    communicator = Communicator(None, device)
    layout = ShardLayout.gather([Fragment(p.name, 0, p.numel) for p in parameters], communicator)
    started = time.perf_counter()
    graph = ParameterGraph.build(
        parameters,
        [family],
        layout,
        {"weights": WeightFeatures(layout.own, weights, 0, communicator)},
        communicator,
        normalized=True,
        progress=lambda done: None,
    )
    transfer = FixedTransfer(response, graph.lambda_max, graph.only_paths, order, 1e-3, device)
    plan = plan_operators(
        graph,
        layout,
        communicator,
        communicator,
        work=Work(transfer.hops, transposes=2),
        exchange="best",
        kernel=kernel,
        bucket_elements=bucket_elements(device),
    )
    seconds = time.perf_counter() - started
    return GraphFilter(plan.operators, transfer), seconds


def newton_schulz(matrices: Tensors) -> None:
    """Muon's orthogonalization in float32 (Jordan et al. 2024): 5 steps of a quintic."""
    for gradient in matrices:
        x = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x


def milliseconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of an action, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def make_optimizer(weights: Tensors, gradients: Tensors) -> torch.optim.Optimizer:
    """AdamW of copies of the weights, with these gradients."""
    trained = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return torch.optim.AdamW(trained, fused=True)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    """Measures everything in one run and prints the table."""
    arguments = parse_arguments()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    parameters = [
        ParameterNodes(f"model.layers.{block}.{name}.weight", shape)
        for block in range(arguments.blocks)
        for name, shape in BLOCK.items()
    ]
    gradients = [torch.randn(p.numel, device=device) for p in parameters]
    weights = [torch.randn_like(gradient) for gradient in gradients]
    copies = [torch.empty_like(gradient) for gradient in gradients]
    matrices = [g.view(p.shape) for g, p in zip(gradients, parameters, strict=True)]
    actions: dict[str, Callable[[], object]] = {
        COPY: lambda: torch._foreach_copy_(copies, gradients),
        "AdamW, fused": make_optimizer(weights, gradients).step,
    }
    columns = [replace(parameter, kind="column") for parameter in parameters]
    built = {}
    for label, family, response, order, kernel in FILTERS:
        nodes = columns if "columns" in label else parameters
        graph_filter, built[label] = make_filter(
            nodes, weights, family, response, order, kernel, device
        )
        actions[label] = functools.partial(graph_filter.apply, copies, 0.5)
    actions[MUON] = lambda: newton_schulz(matrices)

    times = {
        label: milliseconds(action, device, arguments.repeats)
        for label, action in tqdm(actions.items(), desc="benchmark", leave=False)
    }
    elements = sum(parameter.numel for parameter in parameters)
    print(f"{elements / 1e6:.1f} M elements, fp32, {device}, {arguments.threads} threads\n")
    print(f"{'':37}  {'ms':>9}  {'/ copy':>8}  {'/ Muon':>8}  {'build s':>8}")
    for label, value in times.items():
        build = f"{built[label]:8.2f}" if label in built else ""
        ratios = f"{value / times[COPY]:8.2f}  {value / times[MUON]:8.4f}"
        print(f"{label:37}  {value:9.2f}  {ratios}  {build:>8}")


if __name__ == "__main__":
    main()
