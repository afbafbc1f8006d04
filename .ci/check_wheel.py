"""Checks an installed fused-lora beside torch and nothing else: it loads, computes and brings no further package.

Used by cibuildwheel (pyproject.toml) on each wheel, and by the CI matrix.
"""

from importlib import metadata

import torch

import fused_lora

x, weight, lora_A, lora_B = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 8, requires_grad=True), torch.ones(4, 2)
y = fused_lora.lora_linear(x, weight, lora_A, lora_B, 0.5, backend="cpu")
y.sum().backward()
assert torch.equal(y, torch.full((2, 4), 16.0)), y
assert torch.equal(lora_A.grad, torch.full((2, 8), 4.0)), lora_A.grad

installed = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
extras = installed & {"peft", "transformers", "accelerate", "typer", "rich", "matplotlib"}
assert "safetensors" in installed and not extras, extras
print("fused-lora", fused_lora.__version__, "on torch", torch.__version__)
