"""Naive: the same filter without shards, as one would write it first.

Every rank gathers the whole gradient of every parameter, multiplies it by a dense h(L), and keeps
its own part: all of the gradient is sent to everyone, and everyone does everyone's work.
"""

import torch
import torch.distributed as dist
from timing import Clock

from spectral_ds.config import load_config
from spectral_ds.engines import Engine
from spectral_ds.stack import Stack, StackedGraph

FLOAT = 4  # bytes
# As newer versions of torch call it.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Naive:
    """Filters one engine's gradients as `preset: paper` does, until `remove`.

    Args:
        engine: whose; nothing else is installed in it.
        clock: counts the seconds.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine, ranks = engine, engine.communicator.world_size
        config = load_config({"preset": "paper"})
        stack = Stack(engine, config)
        [graph] = stack.graphs
        assert isinstance(graph, StackedGraph)
        device, strength = engine.communicator.device, config.filter.strength
        self._functions = {}
        for node in graph.graph.parameters:
            laplacian = torch.from_numpy(graph.graph.laplacian([node.name]).toarray())
            function = torch.linalg.matrix_exp(-config.filter.tau * laplacian.to(device))
            identity = torch.eye(node.nodes, device=device, dtype=function.dtype)
            self._functions[node.name] = torch.lerp(identity, function, strength).float()
        # Every rank's fragments of these, one after another, padded to the most.
        own = [
            (fragment.parameter, fragment.start, fragment.length)
            for fragment in engine.fragments
            if fragment.parameter in self._functions
        ]
        self._runs = engine.communicator.gather_objects(own)
        longest = max(sum(length for *_, length in runs) for runs in self._runs)
        self._send = torch.zeros(longest, device=device)
        self._received = torch.zeros(ranks, longest, device=device) if ranks > 1 else self._send
        shapes = engine.shapes
        self._whole = {
            name: torch.zeros(shapes[name], device=device).flatten() for name in self._functions
        }
        self.bytes_sent = FLOAT * longest * ranks * (ranks - 1)
        engine.install(clock.of(self.before_step))

    def before_step(self) -> None:
        """Filter the gradients that the engine has."""
        pairs = zip(self._engine.fragments, self._engine.gradients(), strict=True)
        own = [(f, g) for f, g in pairs if f.parameter in self._functions]
        offset = 0
        for fragment, gradient in own:
            part = self._send[offset : offset + fragment.length]
            part.zero_() if gradient is None else part.copy_(gradient)
            offset += fragment.length
        if self._received is self._send:
            self._place(self._send, 0)
        else:
            group = self._engine.communicator.group
            _all_gather(self._received.view(-1), self._send, group=group)
            for rank, received in enumerate(self._received):
                self._place(received, rank)
        for name, whole in self._whole.items():
            function = self._functions[name]
            whole.copy_((function @ whole.view(len(function), -1)).view(-1))
        for fragment, gradient in own:
            if gradient is not None:
                filtered = self._whole[fragment.parameter]
                gradient.copy_(filtered[fragment.start : fragment.start + fragment.length])

    def _place(self, received: torch.Tensor, rank: int) -> None:
        offset = 0
        for name, start, length in self._runs[rank]:
            self._whole[name][start : start + length] = received[offset : offset + length]
            offset += length

    def remove(self) -> None:
        """Take back what was installed."""
        self._engine.remove()
