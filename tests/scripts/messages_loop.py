"""Trains a layer until the plugin has judged its graph; configures logging when it is told to.

Arguments: engine (plain or deepspeed), and when: never, before or after the plugin is imported.
"""

import logging
import sys

import torch

engine, when = sys.argv[1:]
configure = lambda: logging.basicConfig(level="INFO", format="application: %(message)s")  # noqa: E731
if when == "before":
    configure()

import spectral_ds  # noqa: E402

if when == "after":
    configure()

torch.manual_seed(0)
model = torch.nn.Linear(6, 24, bias=False)
section = {"statistics": {"interval": 1}, "monitor": {"interval": 1}}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if engine == "deepspeed":
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "spectral_ds": section,
    }
    model, *_ = spectral_ds.initialize(model=model, optimizer=optimizer, config=config)
else:
    spectral_ds.attach(model, optimizer, section)
for _ in range(22):
    loss = model(torch.randn(8, 6)).square().mean()
    if engine == "deepspeed":
        model.backward(loss)
        model.step()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
if engine == "deepspeed":
    torch.distributed.destroy_process_group()
