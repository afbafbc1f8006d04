"""The layers that hold adapters."""

from fused_lora.nn.linear import LoRALinear

__all__ = ["LoRALinear"]
