"""Random tiny Llamas with trained-looking adapters."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fused_lora import LoRALinear, apply_lora, save_adapter
from fused_lora.models import load_model

TOKENS = torch.arange(40).view(2, 20)


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


def same_start(model):
    """The same A everywhere."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model


def adapted(directory, adapter, dtype=torch.float32, **lora):
    """The model with an adapter that is far from nothing, saved in `adapter`; returns its logits."""
    model, _ = load_model(directory, dtype, "cpu")
    apply_lora(model, 4, 8, **lora)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def logits_of(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert not [module for module in model.modules() if isinstance(module, LoRALinear)]
    with torch.no_grad():
        return model.eval()(TOKENS).logits
