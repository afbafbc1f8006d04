"""fused-lora: LoRA at the price of the frozen linear layer."""

from typing import TYPE_CHECKING

from fused_lora.adapters import apply_lora, load_adapter, merged, print_trainable_parameters, save_adapter, set_adapter
from fused_lora.config import LoraConfig
from fused_lora.nn import LoRALinear
from fused_lora.ops.linear import lora_linear
from fused_lora.ops.update import lora_update

__version__ = "0.1.0"

__all__ = [
    "LoRALinear",
    "LoraConfig",
    "apply_lora",
    "load_adapter",
    "lora_linear",
    "lora_update",
    "merged",
    "print_trainable_parameters",
    "save_adapter",
    "set_adapter",
    "tune",
]

if TYPE_CHECKING:
    from fused_lora.tuning import tune
else:

    def __getattr__(name):
        """`tune`, whose imports are for those who call it."""
        if name != "tune":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fused_lora.tuning import tune

        return tune
