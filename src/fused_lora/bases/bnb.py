"""bitsandbytes' layers: 4 bits in blocks (NF4, FP4) and 8 bits a row (LLM.int8)."""

from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from fused_lora.bases.base import Base
from fused_lora.ops.internals import autocasts


def of(linear: nn.Module) -> Base | None:
    """The base of a Linear4bit, or of a Linear8bitLt that holds int8; None for other layers."""
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        return FourBits(linear)
    if isinstance(linear, bitsandbytes.nn.Linear8bitLt) and not linear.state.has_fp16_weights:
        return EightBits(linear)
    return None


class FourBits(Base):
    """A Linear4bit's weight.

    Where a CPU has bf16 products, the library's forward in eval mode packs the weight anew for a product of its own and
    rounds its scales to bf16. That form has no gradient and dequantises wrongly, so it is unpacked where W is needed;
    scales that are not quantised themselves it leaves transposed then, for the next packing to scramble (0.50.2).
    """

    kind = bitsandbytes.nn.Linear4bit
    few_rows = 8  # 4 rows: 0.3 to 0.7 ms against 0.6 to 1.3; 16 rows: 0.5 to 1.4 against 0.4 to 1.3
    returns_input_dtype = True

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        own = self.linear.compute_dtype
        return own if own is not None and not autocasts(x) else super().compute_dtype(x)

    def product_serves(self, rows: int) -> bool:
        return self._packed() or super().product_serves(rows)  # whose state is put right before its product

    def _state(self) -> Any:
        """The scales; the layer has them, too, since sharding makes another tensor of the weight."""
        state = getattr(self.linear.weight, "quant_state", None) or self.linear.quant_state
        if state is not None and state.absmax.dim() == 2 and not getattr(state, "packing_format_for_cpu", False):
            state.absmax = state.absmax.T.reshape(-1).float()  # [K / blocksize, N], unpacked by whomsoever
        return state

    def _packed(self) -> bool:
        return getattr(self._state(), "packing_format_for_cpu", False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self._state() is None:
            raise ValueError("linear must be quantised, move it to its device first; got a Linear4bit that is not")
        if self._packed():
            self.linear.state_dict()  # which unpacks it in place
        return bitsandbytes.functional.dequantize_4bit(self.linear.weight.data, self._state()).to(dtype)

    def quantised(self, dense: Tensor) -> nn.Parameter:
        weight = self.linear.weight
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        kept = {name: getattr(weight, name) for name in names}
        return bitsandbytes.nn.Params4bit(dense, requires_grad=False, **kept).to(weight.device)

    def put(self, weight: Any) -> None:
        super().put(weight)
        self.linear.quant_state = weight.quant_state


class EightBits(Base):
    """A Linear8bitLt's weight: int8, one scale a row, which moves from the weight into the layer's state in its first
    forward. In eval mode the library's product rounds x to int8, too."""

    kind = bitsandbytes.nn.Linear8bitLt
    few_rows = 128  # 64 rows: 0.9 to 1.5 ms against 1.1 to 4.8; 256 rows: 1.9 to 4.0 against 1.3 to 5.9

    def _scales(self) -> Tensor:
        state, weight = self.linear.state, self.linear.weight
        scales = weight.SCB if state.SCB is None else state.SCB
        if weight.dtype is not torch.int8 or scales is None:
            raise ValueError("linear must be quantised, move it to its device first; got a Linear8bitLt that is not")
        return scales

    def dense(self, dtype: torch.dtype) -> Tensor:
        return bitsandbytes.functional.int8_vectorwise_dequant(self.linear.weight.data, self._scales()).to(dtype)

    def quantised(self, dense: Tensor) -> nn.Parameter:
        on_cpu = bitsandbytes.nn.Int8Params(dense.cpu(), requires_grad=False, has_fp16_weights=False)
        return on_cpu.to(self.linear.weight.device)

    def aside(self) -> nn.Parameter:
        data = self.linear.weight.data
        return bitsandbytes.nn.Int8Params(data, requires_grad=False, CB=data, SCB=self._scales())

    def put(self, weight: nn.Parameter) -> None:
        super().put(weight)
        self.linear.state.reset_grads()
