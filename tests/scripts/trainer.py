"""Trains for one step, by the Trainer of transformers. Knows nothing of spectral_ds."""

import argparse
import sys

import deepspeed
import torch
from transformers import HfArgumentParser, LlamaForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--folder")
parser.add_argument("--output")
args, rest = parser.parse_known_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
[settings] = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(rest)
model = LlamaForCausalLM.from_pretrained(f"{args.folder}/model")
before = {name: p.detach().clone() for name, p in model.named_parameters()}
tokens = torch.load(f"{args.folder}/tokens.pt")
trainer = Trainer(model, settings, train_dataset=[{"input_ids": t, "labels": t} for t in tokens])
trainer.train()

if trainer.is_world_process_zero():
    after = {name: p.detach() for name, p in model.named_parameters()}
    [norm] = [float(log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    torch.save({"before": before, "after": after, "norm": norm}, args.output)
# Together: a process that ends while a thread of gloo still holds tensors may abort.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.exit(0)
