"""The layers that hold adapters."""

from typing import Any

from torch import nn

from fused_lora.nn.conv import CONVOLUTIONS, LoRAConv
from fused_lora.nn.embedding import LoRAEmbedding
from fused_lora.nn.experts import LoRAParameter
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.modules_to_save import ModuleToSave

__all__ = [
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAParameter",
    "check_base",
    "layer_class",
    "lora_layer",
]


def layer_class(module: nn.Module) -> type[LoRALayer]:
    """The class of the layer that gives a module adapters, or its own if it has them."""
    if isinstance(module, LoRALayer):
        return type(module)
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding
    return LoRAConv if isinstance(module, CONVOLUTIONS) else LoRALinear


def check_base(module: nn.Module) -> None:
    """Raises ValueError unless a module can get adapters."""
    if isinstance(module, ModuleToSave):
        raise ValueError(
            "module must not be trained in full, as modules_to_save, or by rows, by another adapter; got one that "
            f"{sorted(module.modules_to_save)} train"
        )
    layer_class(module).check_base(module)


def lora_layer(module: nn.Module, **adapter: Any) -> LoRALayer:
    """A layer with a first adapter for a module, see `LoRALayer.over`. Raises: ValueError as that."""
    return layer_class(module).over(module, **adapter)
