"""The bias of B: y = x Wt + s (h Bt + b_B) + bias, h = x At, which is a bias of s b_B + bias to the op.

Source: Hugging Face PEFT's `lora_bias`.
"""

from typing import Any

from torch import Tensor

from fused_lora.variants import Update


class BiasOfB:
    """A bias of B [N] of one adapter in one layer.

    Args:
        adapter_name: the adapter's name.
    """

    def __init__(self, adapter_name: str):
        self.adapter_name = adapter_name

    def update(self, layer: Any, x: Tensor) -> Update:
        """See LayerVariant."""
        name = self.adapter_name
        lora_A, lora_B = layer.factors(name)
        dropout_p = layer.acting_dropout(name)
        return Update(lora_A, lora_B, layer.scaling[name], dropout_p, {}, bias=layer.out_bias())

    def forget(self) -> None:
        """Nothing is kept."""
