"""grouped_linear(): the frozen product of a mixture's experts, whose rows are sorted by expert."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.backends import cpu_product
from fused_lora.ops.after_import import after_import
from fused_lora.ops.internals import without_autocast

_lib = torch.library.Library("fused_lora", "FRAGMENT")
_lib.define(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets, bool is_transposed) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_GROUPED_MM = (torch.bfloat16, torch.float16, torch.float32)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool = False) -> Tensor:
    """Each expert's linear layer on that expert's rows.

    Equivalent to::

        torch.cat([F.linear(x[offsets[e]:offsets[e + 1]], weight[e]) for e in range(E)])

    with weight[e].t() where `is_transposed`. Differentiable in x alone, as often as wanted: the weight is frozen.

    Args:
        x: [M, K], rows sorted by expert.
        weight: [E, N, K], or [E, K, N] where `is_transposed`, in x's dtype.
        offsets: [E + 1], the integer rows at which the experts begin, and M.
        is_transposed: how the weight lies.
    Returns: [M, N] in x's dtype.
    Raises: ValueError if x is not as wide as the weight.
    """
    return _GroupedLinear.apply(x, weight, offsets, is_transposed)


class _GroupedLinear(torch.autograd.Function):
    """y [M, N] of x [M, K]; saves no x, since the gradient of x is the same op on the transposed weight."""

    @staticmethod
    def forward(x, weight, offsets, is_transposed):
        return torch.ops.fused_lora.grouped_linear(x, weight, offsets, is_transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, weight, offsets, ctx.is_transposed = inputs
        ctx.save_for_backward(weight, offsets)

    @staticmethod
    def backward(ctx: Any, dy):
        weight, offsets = ctx.saved_tensors
        return grouped_linear(dy, weight, offsets, not ctx.is_transposed), None, None, None


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool) -> Tensor:
    matrices = weight if is_transposed else weight.mT  # [E, K, N]
    _check_width(x, weight, is_transposed)
    with without_autocast(x):
        if _has_kernel(x, weight):
            return F.grouped_mm(x.contiguous(), matrices, offs=offsets[1:].to(torch.int32))
        y = x.new_empty(x.shape[0], matrices.shape[2])
        rows, own = offsets.tolist(), cpu_product.paying_rows(matrices.mT) if x.dtype is weight.dtype else range(0)
        for matrix, start, end in zip(matrices, rows, rows[1:], strict=False):
            if end - start in own:
                cpu_product.product(x[start:end], matrix.t(), y=y[start:end])
            elif start < end:
                torch.mm(x[start:end], matrix, out=y[start:end])
        return y


def _check_width(x: Tensor, weight: Tensor, is_transposed: bool) -> None:
    K = weight.shape[1 if is_transposed else 2]
    if x.shape[1] != K:
        raise ValueError(f"x must have the weight's {K} columns; got shape {list(x.shape)}")


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch has one kernel for all experts: of CUDA's compute capability 8.0, for rows of whole 16 bytes. On
    a CPU it has a loop."""
    if x.device.type != "cuda" or x.dtype not in _GROUPED_MM or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    rows = (x.shape[1], *weight.stride()[:2])
    return weight.stride(2) == 1 and not any(length * x.element_size() % 16 for length in rows)


_lib.impl("grouped_linear", _grouped_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_lora::grouped_linear")
def _fake(x, weight, offsets, is_transposed):
    _check_width(x, weight, is_transposed)
    return x.new_empty((x.shape[0], weight.shape[2 if is_transposed else 1]))


def _flops(x, weight, offsets, is_transposed, *_, **__) -> int:
    """2 M N K."""
    return 2 * x[0] * weight[1] * weight[2]


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.fused_lora.grouped_linear)(_flops)


after_import("torch.utils.flop_counter", _register_flops)
