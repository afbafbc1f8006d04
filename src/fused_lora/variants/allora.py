"""ALLoRA: gradients of A and B that shrink row by row as the rows of B A grow.

    dL/d(BA)_i  times  c_i = 1 / sqrt(|(BA)_i| + 1 / eta^2),  for A and B only; forward and dx are plain LoRA's

It is `grad_row_scale = c` of the op, with a scaling of 1: c starts at eta, since B starts at zero.
Source: Huang, Balestriero, "ALLoRA", arXiv 2410.09692, section 4.2: the norm of a row of the product, not squared.
"""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting

from fused_lora.ops.internals import without_autocast
from fused_lora.variants import Update
from fused_lora.variants.once import OncePerStep


@torch.no_grad()
def row_scale(lora_A: Tensor, lora_B: Tensor, eta: float) -> Tensor:
    """c [N] of A [R, K] and B [N, R], in fp32 at least; B A is not formed."""
    with without_autocast(lora_A):
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        norm = (B @ (A @ A.t()) * B).sum(1).clamp_min_(0.0).sqrt_()
        return (norm + 1.0 / eta**2).rsqrt_()


class ALLoRA:
    """ALLoRA of one adapter in one layer, whose scaling is 1 and which has no dropout.

    Args:
        adapter_name: the adapter's name.
        eta: what the gradients of A and B are multiplied by where B is zero.
    """

    def __init__(self, adapter_name: str, eta: float):
        self.adapter_name, self.eta = adapter_name, eta
        self._scale = OncePerStep()

    def update(self, layer: Any, x: Tensor) -> Update:
        """See LayerVariant."""
        name = self.adapter_name
        lora_A, lora_B = layer.factors(name)
        update = Update(lora_A, lora_B, layer.scaling[name], 0.0, {})
        if not torch.is_grad_enabled() or is_exporting():
            return update
        scale = self._scale(lambda: row_scale(lora_A, lora_B, self.eta), lora_A, lora_B)
        return update._replace(optional={"grad_row_scale": scale})

    def forget(self) -> None:
        """Compute c anew next time."""
        self._scale.forget()
