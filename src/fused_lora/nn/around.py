"""LoRALinearAround: a LoRALinear that calls the linear layer under it."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import added, lora_around, of, quantised
from fused_lora.layer_config import LayerConfig
from fused_lora.nn.base_linear import check_linear, is_conv1d
from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.magnitudes import check_called


class LoRALinearAround(LoRALinear):
    """A LoRALinear that keeps its base, a linear layer of any kind, whole as `base_layer` and calls it, so that hooks,
    sharding and a forward of its own act as ever; the updates are added to what comes back. A quantised base that
    `bases` knows is dequantised for `lora_linear` where that is faster.

    `state_dict()` holds the base's entries under base_layer and lora_A, lora_B by adapter. Made by
    `LoRALinear.from_linear`.
    """

    base_layer: nn.Module

    def _adopt(self, linear: Any) -> None:
        self._sizes_of(linear)
        self.base_layer = linear
        self.fan_in_fan_out, self._is_quantised = is_conv1d(linear), quantised(linear)
        self._start_empty()

    def plain(self) -> nn.Module:
        return self.base_layer

    @classmethod
    def check_variant(cls, base: Any, config: LayerConfig) -> None:
        """Raises ValueError for what needs the weight as a plain matrix, where the base's is none."""
        check_called(base, config)

    def forward(self, x: Tensor, *args, **kwargs):
        """What the base returns for its arguments, with the updates of x [..., K] added to it."""
        if self.active_adapter is None or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if self._dora_acts():
            return self._in_turn(x, self.base_layer(x, *args, **kwargs), self._product)
        (lora_A, lora_B, scaling, dropout_p), *others = self._summands()
        if self._is_quantised and not args and not kwargs:
            y = lora_around(self.base_layer, x, lora_A, lora_B, scaling, dropout_p=dropout_p)
        else:
            y = added(self.base_layer(x, *args, **kwargs), x, lora_A, lora_B, scaling, dropout_p)
        for lora_A, lora_B, scaling, dropout_p in others:
            y = added(y, x, lora_A, lora_B, scaling, dropout_p)
        bias = self.out_bias()
        return y if bias is None else (y + bias).to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """The base's result for x, less its bias."""
        y, bias = self.base_layer(x), self.base_layer.bias
        return y if bias is None else y - bias

    def matrix(self) -> Tensor:
        base = of(self.base_layer)
        if base is not None:
            return base.dense(torch.float32)
        weight: Any = self.base_layer.weight
        if weight.is_meta and not self.lora_A[next(iter(self.lora_A))].is_meta:
            raise ValueError("DoRA needs the base weight beside its norms, where the layer is offloaded it is not")
        return weight.t() if self.fan_in_fan_out else weight

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        return (lora_A.t(), lora_B.t()) if self.fan_in_fan_out else (lora_B, lora_A)

    def _check_addable(self) -> None:
        check_linear(self.base_layer)
