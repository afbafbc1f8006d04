"""PEFT's LoRA layers with the op in their forward."""

from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear as PeftTorchaoLoraLinear
from torch import Tensor

from fused_lora.bases import lora_around
from fused_lora.ops.linear import lora_linear
from fused_lora.peft.dora import dora_forward
from fused_lora.peft.mixed_batch import mixed_forward
from fused_lora.peft.request import active_update, linear_fits, readable_base, update_fits


class FusedForward:
    """The forward of PEFT's linear LoRA layers, to stand before one of them in a class's bases: `lora_linear` where
    the base layer's weight is a plain matrix, `lora_around` on base layers of other kinds, and PEFT's forward for all
    that these don't compute."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """y [..., N] of x [..., K]."""
        if not args and kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"] is not None:
            y = mixed_forward(self, x, kwargs["adapter_names"])
            return super().forward(x, **kwargs) if y is None else y  # type: ignore[misc]
        update = "it is called with more than x" if args or kwargs else active_update(self)
        if not isinstance(update, str):
            lora_A, lora_B, scaling, dropout_p, lora_bias, dora = update
            base = readable_base(self)
            if dora is not None:
                y = dora_forward(self, x, base, update)
                if y is not None:
                    return y
            elif isinstance(base, str):
                if update_fits(x, update):
                    linear = self._modules["base_layer"]  # type: ignore[attr-defined]
                    y = lora_around(linear, x, lora_A, lora_B, scaling, dropout_p=dropout_p)
                    return y if lora_bias is None else y + lora_bias.to(y.dtype)
            elif linear_fits(x, base, update):
                weight, bias = base
                if lora_bias is not None:
                    bias = (lora_bias if bias is None else bias + lora_bias).to(weight.dtype)
                return lora_linear(x, weight, lora_A, lora_B, scaling, bias=bias, dropout_p=dropout_p)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class Linear(FusedForward, PeftLinear):
    """PEFT's lora.Linear with the fused forward.

    It adds no state and overrides nothing else, and has PEFT's class name, so that names, files, merging, and whatever
    else PEFT does to its layers are PEFT's. `fuse` makes layers into this class; `explain` says which go where.

    Equivalent to: `peft.tuners.lora.layer.Linear`. Over a bf16 or fp16 base without autocast PEFT computes the low-rank
    path of fp32 adapters in fp32; here its inner result, [..., R], is rounded to the base's dtype, and x is not copied.
    """


class TorchaoLoraLinear(FusedForward, PeftTorchaoLoraLinear):
    """PEFT's layer over a torchao weight with the fused forward."""
