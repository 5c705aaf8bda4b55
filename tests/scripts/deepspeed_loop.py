"""Trains for one step, by DeepSpeed's engine. Knows nothing of spectral_ds."""

import argparse

import deepspeed
import torch
from transformers import LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--folder")
parser.add_argument("--output")
parser.add_argument("--local_rank", type=int, default=-1)
args = deepspeed.add_config_arguments(parser).parse_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
model = LlamaForCausalLM.from_pretrained(f"{args.folder}/model")
optimizer = torch.optim.SGD(model.parameters(), lr=16.0)
engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=optimizer)
assert args.local_rank == engine.local_rank

before = {name: p.detach().clone() for name, p in model.named_parameters()}
tokens = torch.load(f"{args.folder}/tokens.pt")[engine.global_rank :: engine.world_size]
for batch in tokens.chunk(engine.gradient_accumulation_steps()):
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()

if engine.global_rank == 0:
    after = {name: p.detach() for name, p in model.named_parameters()}
    norm = float(engine.get_global_grad_norm())
    torch.save({"before": before, "after": after, "norm": norm}, args.output)
# Together: a process that ends while a thread of gloo still holds tensors may abort.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
