"""A random two-layer Llama and trained-looking values for it."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(dtype=torch.float32, tie=False, hidden=64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def randomise(model: nn.Module, seed=1) -> nn.Module:
    """Trained-looking values in everything that trains."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model
