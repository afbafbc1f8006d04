"""fused-lora: LoRA at the price of the frozen linear layer."""

from fused_lora.adapters import apply_lora, load_adapter, merged, print_trainable_parameters, save_adapter, set_adapter
from fused_lora.config import LoraConfig
from fused_lora.nn import LoRALinear
from fused_lora.ops.linear import lora_linear

__version__ = "0.1.0"

__all__ = [
    "LoRALinear",
    "LoraConfig",
    "apply_lora",
    "load_adapter",
    "lora_linear",
    "merged",
    "print_trainable_parameters",
    "save_adapter",
    "set_adapter",
]
