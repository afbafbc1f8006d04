"""The fused class for each of PEFT's, and back."""

import sys
from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from fused_lora.peft.experts import ParamWrapper, PeftParamWrapper
from fused_lora.peft.layer import Linear, PeftTorchaoLoraLinear, TorchaoLoraLinear
from fused_lora.peft.tokens import PeftTrainableTokensLayer, TrainableTokensLayer


def _pairs() -> list[tuple[type, type]]:
    """(PEFT's class, the fused one). PEFT imports its bitsandbytes layers only where somebody has bitsandbytes."""
    pairs: list[tuple[type, type]] = [
        (PeftLinear, Linear),
        (PeftTorchaoLoraLinear, TorchaoLoraLinear),
        (PeftParamWrapper, ParamWrapper),
        (PeftTrainableTokensLayer, TrainableTokensLayer),
    ]
    if hasattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit"):
        from fused_lora.peft import bitsandbytes as ours

        pairs += [(ours.PeftLinear4bit, ours.Linear4bit), (ours.PeftLinear8bitLt, ours.Linear8bitLt)]
    return pairs


def fused_class(layer: Any) -> type | None:
    """The fused class for a layer that is exactly of one of PEFT's classes; its own if it is fused; else None."""
    return next((fused for peft, fused in _pairs() if type(layer) in (peft, fused)), None)


def swap(layer: nn.Module) -> None:
    """Make a layer of PEFT's class into one of the fused class; leave any other."""
    layer.__class__ = fused_class(layer) or type(layer)


def swap_back(layer: nn.Module) -> None:
    """The inverse of `swap`."""
    layer.__class__ = next((peft for peft, fused in _pairs() if type(layer) is fused), type(layer))
