"""PEFT's LoRA layers over bitsandbytes' linear layers with the op in their forward; imports bitsandbytes."""

from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bitLt

from fused_lora.peft.layer import FusedForward


class Linear4bit(FusedForward, PeftLinear4bit):
    """PEFT's layer over a 4-bit weight with the fused forward."""


class Linear8bitLt(FusedForward, PeftLinear8bitLt):
    """PEFT's layer over an int8 weight with the fused forward."""
