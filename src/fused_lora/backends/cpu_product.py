"""The CPU's base product alone (csrc/cpu/product.cpp), for layers whose update is no plain LoRA's."""

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.ops.internals import empty_on_cpu

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}
_FEATURES = _C.cpu_features()


def serves(dtype: torch.dtype) -> bool:
    """Whether there is one where plain LoRA's plan is "inside". On AMX that has no product alone."""
    return dtype is torch.float32 or (dtype is torch.bfloat16 and _FEATURES["bf16_dot"] and not _FEATURES["amx"])


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wt + bias [M, N] of x [M, K] and W [N, K], whose neighbouring columns are adjacent in memory."""
    return _product(x, weight, bias, weight.shape[0], False)


def product_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W [M, K] of dy [M, N]."""
    return _product(dy, weight, None, weight.shape[1], True)


def _product(left: Tensor, weight: Tensor, bias: Tensor | None, width: int, by_rows: bool) -> Tensor:
    left = left if left.stride(1) == 1 else left.contiguous()
    bias = bias if bias is None else bias.contiguous()
    M, K = left.shape
    out = empty_on_cpu((M, width), (width, 1), left.dtype)
    _C.cpu_product(
        left=(left.data_ptr(), left.stride(0)),
        right=(weight.data_ptr(), weight.stride(0)),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        sizes=(M, width, K),
        dtype=_CODE[left.dtype],
        by_rows=by_rows,
        threads=torch.get_num_threads(),
    )
    return out
