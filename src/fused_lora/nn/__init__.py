"""The layers that hold adapters."""

from torch import nn

from fused_lora.nn.base_linear import check_linear
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.linear import LoRALinear

__all__ = ["LoRALayer", "LoRALinear", "check_base", "layer_class", "lora_layer"]


def layer_class(module: nn.Module) -> type[LoRALayer]:
    """The class of the layer that gives a module adapters, or its own if it has them."""
    return type(module) if isinstance(module, LoRALayer) else LoRALinear


def check_base(module: nn.Module) -> None:
    """Raises ValueError unless a module can get adapters."""
    check_linear(module)


def lora_layer(module: nn.Module, **adapter) -> LoRALayer:
    """A layer with a first adapter for a module, which it freezes: nothing is copied and tied weights stay tied.

    Args:
        module: what `check_base` lets pass.
        adapter: as in `LoRALinear.from_linear`.
    Raises: ValueError naming the argument, what was expected and what was given.
    """
    return LoRALinear.from_linear(module, **adapter)
