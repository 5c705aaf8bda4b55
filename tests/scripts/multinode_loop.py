"""Trains a model of plain torch for three steps, by DeepSpeed's engine. Attaches no plugin."""

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

SEQUENCES, WIDTH, INNER = 24, 48, 75  # odd, so that shard boundaries cut rows


class Blocks(torch.nn.Module):
    """Three residual blocks; nothing of it needs more than torch, whose import takes seconds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {"up": torch.nn.Linear(WIDTH, INNER), "down": torch.nn.Linear(INNER, WIDTH)}
            )
            for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x.square().mean()


parser = argparse.ArgumentParser()
parser.add_argument("--output")
parser.add_argument("--local_rank", type=int, default=-1)
args = deepspeed.add_config_arguments(parser).parse_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
is_own = not dist.is_initialized()  # one node's ranks are those of the tests, which go on
deepspeed.init_distributed("gloo")
model = Blocks()
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
    config=json.loads(Path(args.deepspeed_config).read_text()),
)
generator, losses = torch.Generator().manual_seed(1), []
for _ in range(3):
    batch = torch.randn(SEQUENCES, WIDTH, generator=generator)
    loss = engine(batch[dist.get_rank() :: dist.get_world_size()])
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())

weights = {}
for name, parameter in engine.module.named_parameters():
    with deepspeed.zero.GatheredParameters([parameter]):
        weights[name] = parameter.detach().clone()
here = {"losses": losses, "interface": os.environ["GLOO_SOCKET_IFNAME"]}
ranks = [here] * dist.get_world_size()
dist.all_gather_object(ranks, here)
engine.destroy()
if dist.get_rank() == 0:
    torch.save({"weights": weights, "ranks": ranks}, args.output)
if is_own:  # together: a process that ends while a thread of gloo holds tensors may abort
    dist.barrier()
    dist.destroy_process_group()
