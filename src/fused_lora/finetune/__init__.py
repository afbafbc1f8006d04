"""`fused-lora finetune` and `fused-lora merge`: causal language models on text or JSONL, by an adapter or whole."""
