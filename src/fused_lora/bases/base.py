"""Base, what all quantised weights have in common, and who stands for a given layer's."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.ops.internals import any_module_hook, autocasts, bare, runs


class Base:
    """The quantised weight W [N, K] of a linear layer, which stays the layer's own.

    Args:
        linear: the layer. It is read anew in each call, so that a weight that was moved or merged counts.
    """

    # Up to how many rows the library's own product with `lora_update` is faster than its dequantisation with
    # `lora_linear`, where no gradient of x is needed. The figures of each kind: bf16, fp32 adapters of rank 16, two
    # cores of a Xeon with AMX, W 1536 x 576 and 2048 x 2048, 2026-11-26.
    few_rows = 0
    kind: type[nn.Module] = nn.Linear  # whose forward the dense view stands for; a subclass with its own is called
    returns_input_dtype = False  # whether a call returns x's dtype whatever it computes in

    def __init__(self, linear: nn.Module):
        self.linear: Any = linear

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that a call with x computes in."""
        return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype

    def untouched(self) -> bool:
        """Whether a call of the layer is its library's forward and nothing else: no hooks, no forward of its own or of
        a subclass."""
        return not any_module_hook() and runs(self.linear, self.kind) and bare(self.linear)

    def product_serves(self, rows: int) -> bool:
        """Whether the library's own product is the faster one where no gradient of x is needed."""
        return rows <= self.few_rows

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] by the library's own dequantisation, in memory that is the caller's and goes when he drops it.

        Raises: ValueError if the layer is not quantised yet.
        """
        raise NotImplementedError

    def quantised(self, dense: Tensor) -> nn.Parameter:
        """Another W [N, K], fp32, quantised as this one is. Raises: ValueError if the library cannot."""
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raises ValueError if the library cannot quantise another W as this one is."""

    def aside(self) -> nn.Parameter:
        """The weight and all that belongs to it, for `put`."""
        return self.linear.weight

    def put(self, weight: nn.Parameter) -> None:
        """Let a weight of `quantised` or `aside` be the layer's."""
        self.linear.weight = weight

    @torch.no_grad()
    def merged(self, update: Tensor) -> nn.Parameter:
        """W + update [N, K], added in fp32 and quantised again, which rounds it as PEFT's merge does.

        Raises: ValueError if the sum is not finite or the library cannot quantise it.
        """
        dense = self.dense(torch.float32).add_(update)
        if not torch.isfinite(dense).all():
            raise ValueError(
                f"the merged weight must be finite; got {int((~torch.isfinite(dense)).sum())} elements that are not"
            )
        return self.quantised(dense)


@lru_cache(64)
def _libraries(kind: type) -> frozenset[str]:
    """The libraries that a class and its bases come from; asked in every call of a layer."""
    return frozenset(each.__module__.partition(".")[0] for each in kind.__mro__)


def of(linear: nn.Module) -> Base | None:
    """The base that stands for a linear layer's weight: bitsandbytes' 4 and 8 bits, torchao's quantised tensors; None
    for a plain weight and for kinds that none of our files knows."""
    kind: type = type(linear)
    if "bitsandbytes" in _libraries(kind):
        from fused_lora.bases import bnb

        return bnb.of(linear)
    # past a property, such as a parametrization's, which may change its buffers each time that it is read
    weight = linear.__dict__.get("weight", linear._parameters.get("weight"))
    if type(weight).__module__.partition(".")[0] == "torchao":
        from fused_lora.bases import torchao

        return torchao.of(linear)
    return None
