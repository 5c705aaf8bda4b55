"""Trains a model of the tests for three steps, by DeepSpeed's engine. Attaches no plugin."""

import argparse
import json
import os
from pathlib import Path

import deepspeed
import tiny
import torch
import torch.distributed as dist
from cells import Training

parser = argparse.ArgumentParser()
parser.add_argument("--output")
parser.add_argument("--local_rank", type=int, default=-1)
args = deepspeed.add_config_arguments(parser).parse_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
is_own = not dist.is_initialized()  # one node's ranks are those of the tests, which go on
deepspeed.init_distributed("gloo")
given = json.loads(Path(args.deepspeed_config).read_text())
stage = given["zero_optimization"]["stage"]
training = Training(
    f"zero{stage}",
    given["spectral_ds"],
    torch.optim.AdamW,
    tiny.ADAM_RATES,
    initialize=deepspeed.initialize,
)
losses = training.train(3)
weights = {name: torch.from_numpy(value) for name, value in training.snapshot().items()}

here = {"losses": losses, "interface": os.environ["GLOO_SOCKET_IFNAME"]}
ranks = [here] * dist.get_world_size()
dist.all_gather_object(ranks, here)
training.close()
if dist.get_rank() == 0:
    torch.save({"weights": weights, "ranks": ranks}, args.output)
if is_own:  # together: a process that ends while a thread of gloo holds tensors may abort
    dist.barrier()
    dist.destroy_process_group()
