"""WithMagnitudes: DoRA's lengths of rows in a layer, beyond what the op does with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.bases import added, quantised
from fused_lora.deepspeed_zero import gathered
from fused_lora.layer_config import LayerConfig
from fused_lora.nn.base_linear import is_plain_weight
from fused_lora.nn.by_name import Summand
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.merged_weight import COMPUTED
from fused_lora.variants.dora import DoRA


def check_called(base: nn.Module, config: LayerConfig) -> None:
    """Raises ValueError for an adapter that a layer which calls its base cannot have."""
    kind = f"{type(base).__module__.partition('.')[0]} {type(base).__name__}"
    if config.allora_eta is not None and config.allora_mode == "gradient":
        raise ValueError(
            "allora_eta must be None over a layer that is called, kept whole, unless allora_mode='update'; got one on "
            f"a {kind}"
        )
    weight = getattr(base, "weight", None)
    plain = is_plain_weight(weight)
    if not plain and weight is not None:
        kind += f" whose weight is {COMPUTED if type(weight) is Tensor else f'a {type(weight).__name__}'}"
    if config.use_dora and not (plain or quantised(base)):
        raise ValueError(f"use_dora needs a weight that can be read or dequantised; got a {kind}")
    if config.dora_exact and not plain:
        raise ValueError(f"dora_exact needs a weight that is not quantised, or is kept dense; got a {kind}")


def scaled(y: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """g [N] times y [..., N] but for the bias in it; y bit for bit where g is 1."""
    return (y * g if bias is None else y * g + (1.0 - g) * bias).to(y.dtype)


def scaled_dropping(y: Tensor, x: Tensor, product: Callable[[Tensor], Tensor], summand: Summand, g: Tensor) -> Tensor:
    """y + (g - 1) * (W x_d) + g * s B A x_d with the dropped x_d, DoRA's update of y [..., N] where it drops from x.

    Args:
        product: x Wt of an x.
    """
    lora_A, lora_B, scaling, dropout_p = summand
    dropped = F.dropout(x, dropout_p)
    y = (y + (g - 1.0) * product(dropped)).to(y.dtype)
    return added(y, dropped, lora_A.to(g.dtype), lora_B * g[:, None], scaling, 0.0)


class WithMagnitudes(LoRALayer):
    """A layer of which adapters may be DoRA: m in its start, among several active adapters and in the merged weight."""

    bias: Tensor | None

    def _dora_acts(self) -> bool:
        """Whether an active adapter is DoRA."""
        return any(name in self.lora_magnitude_vector for name in self.active_adapters)

    def _in_turn(self, x: Tensor, y: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """y [..., N], the base layer's, with one active adapter after the other, as PEFT does it: a DoRA adapter scales
        what those before it have added, too, unless it drops from x.

        Args:
            product: x Wt of another x.
        """
        for name, (lora_A, lora_B, scaling, dropout_p) in zip(self.active_adapters, self._acting()):
            variant = self.variants.get(name)
            if not isinstance(variant, DoRA):
                y = added(y, x, lora_A, lora_B, scaling, dropout_p)
                if name in self.lora_bias:
                    y = (y + self.lora_bias[name] * scaling).to(y.dtype)
                continue
            g = variant.scale(self, lora_A, lora_B)
            if dropout_p > 0.0:
                y = scaled_dropping(y, x, product, (lora_A, lora_B, scaling, dropout_p), g)
            else:
                y = scaled(added(y, x, lora_A, lora_B, scaling, 0.0), g, self.bias)
        return y

    def reset_lora_parameters(self, adapter_name: str) -> None:
        super().reset_lora_parameters(adapter_name)
        self.reset_magnitude(adapter_name)

    @torch.no_grad()
    def reset_magnitude(self, adapter_name: str) -> None:
        """Let the m of a DoRA adapter be the norms of the rows as they are, so that it scales nothing; nothing happens
        to other adapters."""
        if adapter_name in self.lora_magnitude_vector:
            variant: Any = self.variants[adapter_name]
            lora_A, lora_B = self.lora_A[adapter_name], self.lora_B[adapter_name]
            with gathered([getattr(self.base(), "weight", None)]):
                n, empty = variant.norms(self, lora_A, lora_B)
            self.lora_magnitude_vector[adapter_name].copy_(n if empty is None else n - empty)

    def _merged_rows(self, adapter_name: str) -> Tensor | None:
        variant = self.variants.get(adapter_name)
        if not isinstance(variant, DoRA):
            return None
        with torch.no_grad():
            g = variant.scale(self, self.lora_A[adapter_name], self.lora_B[adapter_name])
        return g if self.fan_in_fan_out else g[:, None]
