"""The CPU's base product alone (csrc/cpu/product.cpp), for layers whose update is no plain LoRA's."""

import sys

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.ops.internals import empty_on_cpu

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}
_FEATURES = _C.cpu_features()
# Below, turning W to pack it costs more than MKL's product without it (EPYC 9004, 2026-11-24); of rows of W as they lie
# up to FEW_ROWS are multiplied unpacked.
LEAST_ROWS = 4
FEW_ROWS = _C.few_rows


def serves(dtype: torch.dtype) -> bool:
    """Whether there is one where plain LoRA's first plan is "inside". On AMX that has no product alone."""
    if dtype is torch.float32:
        return _FEATURES["avx2"]
    return dtype is torch.bfloat16 and _FEATURES["bf16_dot"] and not _FEATURES["amx"]


def packs(rows: int, stride: int) -> bool:
    """Whether a product of so many rows is faster with a packed W than PyTorch's.

    Args:
        stride: of W along the dimension that is summed; 1 where W must be turned, else it is packed as it lies, and
            is faster from a single row on (of PyTorch's time 0.3 to 0.8 in fp32, 0.5 to 1.05 in bf16, W from memory;
            EPYC 9005, 2026-11-27).
    """
    return rows >= LEAST_ROWS or stride != 1


def paying_rows(weights: Tensor) -> range:
    """With how many rows the product alone with a W of [..., N, K], which comes from memory, is faster than PyTorch's:
    few, all in fp32, and all where rows of memory are columns of W, as for dx; in bf16 it is up to half as slow again
    for many rows else (EPYC 9005, 2026-11-27)."""
    if not (weights.is_cpu and serves(weights.dtype)) or 0 in weights.shape:
        return range(0)
    single = weights.dtype is torch.float32
    return range(1, sys.maxsize if single or weights.stride(-1) != 1 else FEW_ROWS + 1)


def laid(weight: Tensor) -> tuple[Tensor, int, bool]:
    """A weight [N, K] as the kernels take it: itself, the stride of its rows and whether these are its transpose's. A
    copy where neither its columns nor its rows have their neighbours beside them in memory."""
    if weight.stride(1) == 1:
        return weight, weight.stride(0), False
    if weight.stride(0) == 1:
        return weight, weight.stride(1), True
    return weight.contiguous(), weight.shape[1], False


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """y = x Wt + bias [M, N] of x [M, K] and W [N, K]; into `y`, contiguous, if it is given. dx = dy W is the product
    with the transpose of W."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    weight, ldw, transposed = laid(weight)
    (N, K), M = weight.shape, x.shape[0]
    if y is None:
        y = empty_on_cpu((M, N), (N, 1), x.dtype)
    _C.cpu_product(
        x=(x.data_ptr(), x.stride(0)),
        W=(weight.data_ptr(), ldw, transposed),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        sizes=(M, N, K),
        dtype=_CODE[x.dtype],
        threads=torch.get_num_threads(),
    )
    return y
