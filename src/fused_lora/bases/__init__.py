"""What stands for the weight where a linear layer holds no plain matrix: one file for each kind of base.

A base is found by `of`, makes a dense view of its weight and takes a merged one; `lora_around` computes a LoRA layer on
any linear layer, with or without a base of ours. The libraries are imported only where a layer of theirs is met, which
their import has made.
"""

from torch import nn

from fused_lora.bases.around import added, lora_around
from fused_lora.bases.base import Base, of

__all__ = ["Base", "added", "lora_around", "of", "quantised"]


def quantised(linear: nn.Module) -> bool:
    """Whether a layer's weight is one of the quantised kinds that `of` knows."""
    return of(linear) is not None
