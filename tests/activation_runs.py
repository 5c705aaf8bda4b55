"""Runs with a graph of activations in one process, beside what their steps are without it."""

import numpy as np
import torch
from activations import RATE, CalledByIds, trained

import spectral_ds

LEARNS = {"rank": 8, "learn": "training", "samples": 20}


class Run:
    """A model, steps of it by SGD, and what they are without a filter."""

    def __init__(self, section, model=None):
        self.model = CalledByIds() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.plugin = spectral_ds.attach(self.model, self.optimizer, section)
        self.begin = self.weights()

    def weights(self):
        return {n: p.detach().double().numpy().copy() for n, p in self.model.named_parameters()}

    def step(self, *micro_batches, closure=False):
        """(facts of the step without the plugin, what it changed)."""
        before = self.weights()

        def evaluate():
            self.optimizer.zero_grad()
            for ids in micro_batches:
                loss = self.model(ids) / len(micro_batches)
                loss.backward()
            gradients.update(
                (n, p.grad.double().numpy().copy())
                for n, p in self.model.named_parameters()
                if p.grad is not None
            )
            return loss

        gradients = {}
        if closure:
            self.optimizer.step(evaluate)
        else:
            evaluate()
            self.optimizer.step()
        after = self.weights()
        moved = {n: (before[n] - after[n]) / RATE for n in trained(self.model)}
        # The graph is of the weights at attach.
        plain = {"weights": self.begin, "rates": dict.fromkeys(moved, RATE)}
        return {**plain, "gradients": {n: gradients.get(n, 0 * moved[n]) for n in moved}}, moved

    def hooks(self):
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.model.modules())


def learned_from(run, batches):
    """By key, the ids of what is learned; they were seen with the weights of those steps."""
    return {number: np.asarray(ids) for number, ids in enumerate(batches)}
