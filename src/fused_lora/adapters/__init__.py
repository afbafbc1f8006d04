"""Adapters of whole models."""

from fused_lora.adapters.experts import expert_rank_pattern, share_outer
from fused_lora.adapters.load_save import load_adapter, save_adapter
from fused_lora.adapters.merging import merged
from fused_lora.adapters.mixed_batch import adapters_per_sample, adapters_per_token
from fused_lora.adapters.model import apply_lora, get_nb_trainable_parameters, print_trainable_parameters, set_adapter
from fused_lora.adapters.reference import reference_model
from fused_lora.adapters.unload import delete_adapter, disable_adapter, merge_and_unload, unload
from fused_lora.adapters.weighted import add_weighted_adapter

__all__ = [
    "adapters_per_sample",
    "adapters_per_token",
    "add_weighted_adapter",
    "apply_lora",
    "delete_adapter",
    "disable_adapter",
    "expert_rank_pattern",
    "get_nb_trainable_parameters",
    "load_adapter",
    "merge_and_unload",
    "merged",
    "print_trainable_parameters",
    "reference_model",
    "save_adapter",
    "set_adapter",
    "share_outer",
    "unload",
]
