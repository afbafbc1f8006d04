"""Adapters of whole models."""

from fused_lora.adapters.load_save import load_adapter, save_adapter
from fused_lora.adapters.model import apply_lora, merged, print_trainable_parameters, set_adapter

__all__ = ["apply_lora", "load_adapter", "merged", "print_trainable_parameters", "save_adapter", "set_adapter"]
