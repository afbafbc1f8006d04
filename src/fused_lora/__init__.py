"""fused-lora: LoRA at the price of the frozen linear layer."""

from fused_lora.functional import lora_linear

__all__ = ["lora_linear"]
