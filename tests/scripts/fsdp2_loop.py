"""Trains for one step, sharded by fully_shard (FSDP2). Knows nothing of spectral_ds."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaForCausalLM

folder, output, limit = sys.argv[1:]
dist.init_process_group("gloo")
model = LlamaForCausalLM.from_pretrained(f"{folder}/model")
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.SGD(model.parameters(), lr=16.0)
before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
tokens = torch.load(f"{folder}/tokens.pt")[dist.get_rank() :: dist.get_world_size()]
model(input_ids=tokens, labels=tokens).loss.backward()
norm = clip_grad_norm_(model.parameters(), float(limit)).full_tensor()
optimizer.step()
optimizer.zero_grad()

after = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
if dist.get_rank() == 0:
    torch.save({"before": before, "after": after, "norm": norm.item()}, output)
# Together: a process that ends while a thread of gloo still holds tensors may abort.
dist.barrier()
dist.destroy_process_group()
