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
    "MergeSchedule",
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

_LAZY = {"MergeSchedule": "fused_lora.schedules", "tune": "fused_lora.tuning"}  # imported for those who use them

if TYPE_CHECKING:
    from fused_lora.schedules import MergeSchedule
    from fused_lora.tuning import tune
else:

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
