"""A drop-in layer: LoRALinear in place of a linear layer of a model in plain PyTorch, without transformers and PEFT.

Run: python examples/layer.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import fused_lora

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
x, wanted = torch.randn(512, 64), torch.randn(512, 64)
before = model(x)

# The weight is the very Parameter of the old layer, frozen; A and B are new and train. All layers of a model at once:
# fused_lora.apply_lora(model, r=8).
model[0] = fused_lora.LoRALinear.from_linear(model[0], r=8, lora_alpha=16)
model[2].requires_grad_(False)
assert torch.allclose(model(x), before, atol=1e-5)  # B starts as zeros
fused_lora.print_trainable_parameters(model)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(20):
    loss = F.mse_loss(model(x), wanted)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}")

model[0].merge()  # W + s B A, a plain linear layer's price; unmerge() restores W bit for bit
print(f"merged: loss {F.mse_loss(model(x), wanted).item():.3f}")
