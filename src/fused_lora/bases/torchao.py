"""torchao's quantised tensors, as `quantize_` puts them in a layer: int8, int4 and float8 weights."""

import torch
from torch import Tensor, nn
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor

from fused_lora.bases.base import Base

_OF_THE_INPUT = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")


def of(linear: nn.Module) -> Base | None:
    """The base of a layer whose weight is all that is quantised and can be dequantised; None for other tensors."""
    weight = linear.weight
    if not hasattr(weight, "dequantize") or any(getattr(weight, name, None) is not None for name in _OF_THE_INPUT):
        return None
    return Int8(linear) if isinstance(weight, Int8Tensor) else Quantised(linear)


class Quantised(Base):
    """A weight of any of torchao's kinds. Autograd keeps W dense from the forward to the backward where the library's
    own product runs; here W is dequantised twice instead."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.linear.weight.dequantize().to(dtype)

    def check_mergeable(self) -> None:
        weight = self.linear.weight
        if not isinstance(weight, Float8Tensor | Int8Tensor):
            raise ValueError(f"the weight must be torchao's int8 or float8 to be merged; got {type(weight).__name__}")

    def quantised(self, dense: Tensor) -> nn.Parameter:
        self.check_mergeable()
        weight = self.linear.weight
        dense = dense.to(weight.dtype)
        granularity = PerTensor() if weight.scale.numel() == 1 else PerRow()
        if isinstance(weight, Int8Tensor):
            again = Int8Tensor.from_hp(dense, granularity)
        else:
            again = Float8Tensor.from_hp(dense, weight.qdata.dtype, granularity)
        return nn.Parameter(again, requires_grad=False)


class Int8(Quantised):
    """An int8 weight, whose product the library computes without a dense W."""

    few_rows = 512  # 256 rows: 1.2 to 3.0 ms against 1.4 to 5; 1024 rows: 2.6 to 8.6 against 2.3 to 9
