"""fused-lora: LoRA at the price of the frozen linear layer."""

import importlib
from typing import TYPE_CHECKING

import torch  # noqa: F401  before the compiled part: the first libstdc++ of a process serves both

_fault = ""
try:
    importlib.import_module("fused_lora._C")
except ImportError as error:  # `fused-lora info` runs without it, and whoever uses a name below is told
    _cure = "" if str(error).startswith("FUSED_LORA_") else ": install again with a C++ compiler at hand"
    _fault = f"fused-lora's compiled part does not load ({error}){_cure}"
else:
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
        """A public name of a module that is imported on first use. Raises: ImportError saying why where the compiled
        part does not load."""
        if _fault and (name == "_C" or name in __all__):
            raise ImportError(_fault, name="fused_lora._C")
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"fused_lora.{_LATER[name]}"), name)

    def __dir__():
        return sorted({*globals(), *_LATER})
