"""fused-lora: LoRA at the price of the frozen linear layer."""

from typing import TYPE_CHECKING

from fused_lora.adapters import (
    adapters_per_sample,
    adapters_per_token,
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
    "LoRAFlow",
    "LoRALinear",
    "LoraConfig",
    "MergeSchedule",
    "adapters_per_sample",
    "adapters_per_token",
    "add_weighted_adapter",
    "apply_lora",
    "delete_adapter",
    "disable_adapter",
    "expert_rank_pattern",
    "get_nb_trainable_parameters",
    "group",
    "grouped_lora_update",
    "link_reslora",
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
    "ungroup",
    "unload",
]

if TYPE_CHECKING:
    from fused_lora.adapters.flow import LoRAFlow
    from fused_lora.adapters.group import group, ungroup
    from fused_lora.adapters.reslora import link_reslora
    from fused_lora.schedules import MergeSchedule
    from fused_lora.tuning import tune
else:
    _LATER = {
        "LoRAFlow": "adapters.flow",
        "MergeSchedule": "schedules",
        "group": "adapters.group",
        "link_reslora": "adapters.reslora",
        "tune": "tuning",
        "ungroup": "adapters.group",
    }

    def __getattr__(name):
        """A public name of a module that is imported on first use."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(f"fused_lora.{_LATER[name]}"), name)

    def __dir__():
        return sorted({*globals(), *_LATER})
