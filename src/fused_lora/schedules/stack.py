"""All stages of a schedule as one adapter."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_lora.adapters.holders import copy_saved, holders_of
from fused_lora.adapters.load_save import save_adapter
from fused_lora.config import STARTS_OF_WEIGHTS
from fused_lora.nn.experts import LoRAParameter
from fused_lora.nn.layer import LoRALayer

Links = list[tuple[Tensor, Tensor]]  # A and B of each stage, B with its factor in it
_NAME = "merge_schedule_stack"  # of the adapter that exists while it is written


def check_stackable(layers: Mapping[str, LoRALayer], adapter_name: str) -> None:
    """Raises ValueError for a layer whose stages cannot be one adapter of the original base."""
    for name, layer in layers.items():
        if (start := layer.init_lora_weights[adapter_name]) in STARTS_OF_WEIGHTS:
            raise ValueError(
                f"export must be 'weights' with init_lora_weights={start!r}, which took the adapter's start out of the "
                f"base weight; got 'stack' and {name}"
            )
        if isinstance(layer, LoRAParameter):
            raise ValueError(f"export must be 'weights' with target_parameters; got 'stack' and the parameter {name}")


@torch.no_grad()
def write_stack(
    model: nn.Module, adapter_name: str, layers: Mapping[str, LoRALayer], links: Mapping[str, Links], directory: Path
) -> None:
    """Write A [sum of R, ...] and B [N, sum of R, ...] of each layer as an adapter of scaling 1, with the copies of
    modules_to_save and the trained biases that belong to `adapter_name`.

    Raises: OSError naming the file.
    """
    wrappers = holders_of(model, adapter_name)[1]
    try:
        with torch.random.fork_rng():  # fresh adapters draw numbers
            for name, layer in layers.items():
                lora_A = torch.cat([lora_A for lora_A, _ in links[name]])
                lora_B = torch.cat([lora_B for _, lora_B in links[name]], 1)
                layer.add_adapter(_NAME, r=len(lora_A), lora_alpha=len(lora_A))
                layer.trains_bias[_NAME] = layer.trains_bias[adapter_name]
                layer.lora_A[_NAME].copy_(lora_A)
                layer.lora_B[_NAME].copy_(lora_B)
        copy_saved(wrappers, adapter_name, _NAME)
        save_adapter(model, directory, _NAME)
    finally:
        for layer in layers.values():
            if _NAME in layer.lora_A:
                layer.delete_adapter(_NAME)
        for wrapper in wrappers.values():
            if _NAME in wrapper.modules_to_save:
                del wrapper.modules_to_save[_NAME]
