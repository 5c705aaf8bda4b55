"""Trains for one step, by Accelerate with DistributedDataParallel. Knows nothing of spectral_ds."""

import sys

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

folder, output, limit = sys.argv[1:]
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = LlamaForCausalLM.from_pretrained(f"{folder}/model")
before = {name: p.detach().clone() for name, p in model.named_parameters()}
tokens = torch.load(f"{folder}/tokens.pt")
loader = torch.utils.data.DataLoader(tokens, batch_size=3)
optimizer = torch.optim.SGD(model.parameters(), lr=16.0)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        # As careless loops do: after every micro-batch.
        norm = accelerator.clip_grad_norm_(model.parameters(), float(limit))
        optimizer.step()
        optimizer.zero_grad()

if accelerator.is_main_process:
    after = {name: p.detach() for name, p in accelerator.unwrap_model(model).named_parameters()}
    torch.save({"before": before, "after": after, "norm": float(norm)}, output)
accelerator.end_training()
