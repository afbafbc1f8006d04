"""LoRA variants: each turns a layer's parameters into the op's optional tensors, and none has a forward of its own.

A variant of one adapter stands in `LoRALinear.variants` by the adapter's name; one that links layers or several
adapters stands in `LoRALinear.link`, and acts instead of whatever adapter is active.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Update(NamedTuple):
    """What a layer hands to `lora_linear` beside x, weight and bias."""

    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    scaling: float | Tensor
    dropout_p: float  # 0 outside training
    optional: dict[str, Any]  # the op's optional tensors by name
    take_h: Callable[[Tensor], None] | None = None  # is given h = x_lora At [..., R] where the variant has use for it
    x: Tensor | None = None  # [..., K], in the place of the layer's input
    bias: Tensor | None = None  # [N], beside the layer's own
    more: "Update | None" = None  # of which the result, without a bias, is added


class LayerVariant(Protocol):
    """What a layer asks a variant for, in every forward."""

    def update(self, layer: Any, x: Tensor) -> Update:
        """The low-rank half of the layer's call on x [..., K]."""
        ...


class LayerLink(LayerVariant, Protocol):
    """What a layer asks the variant that links it with others for, beside that."""

    def acts_with(self, active: str | list[str] | None) -> bool:
        """Whether it stands where `set_adapter` makes these adapters of the layer active, and has them train."""
        ...

    def merged_updates(self, layer: Any) -> list[tuple[Tensor, Tensor, float]]:
        """Left, right and scaling of the products that merging adds to the base weight, see `LoRALayer._factors`.
        Raises: ValueError if there are none."""
        ...


class AdapterVariant(LayerVariant, Protocol):
    """What makes one adapter of a layer no plain LoRA."""

    def forget(self) -> None:
        """Drop what was computed from the parameters, which may be others now."""
        ...
