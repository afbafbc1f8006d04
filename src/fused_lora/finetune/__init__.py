"""`fused-lora finetune` and `fused-lora merge`: LoRA for causal language models on text files."""
