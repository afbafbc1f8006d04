"""fused-lora: LoRA at the price of the frozen linear layer."""

from typing import TYPE_CHECKING

from fused_lora.adapters import (
    add_weighted_adapter,
    apply_lora,
    delete_adapter,
    disable_adapter,
    expert_rank_pattern,
    get_nb_trainable_parameters,
    load_adapter,
    merge_and_unload,
    merged,
    print_trainable_parameters,
    reference_model,
    save_adapter,
    set_adapter,
    share_outer,
    unload,
)
from fused_lora.config import LoraConfig
from fused_lora.nn import LoRALinear
from fused_lora.ops.grouped import grouped_lora_update
from fused_lora.ops.linear import lora_linear
from fused_lora.ops.update import lora_update

__version__ = "0.1.0"

__all__ = [
    "LoRALinear",
    "LoraConfig",
    "add_weighted_adapter",
    "apply_lora",
    "delete_adapter",
    "disable_adapter",
    "expert_rank_pattern",
    "get_nb_trainable_parameters",
    "grouped_lora_update",
    "load_adapter",
    "lora_linear",
    "lora_update",
    "merge_and_unload",
    "merged",
    "print_trainable_parameters",
    "reference_model",
    "save_adapter",
    "set_adapter",
    "share_outer",
    "tune",
    "unload",
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
