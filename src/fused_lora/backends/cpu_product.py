"""The CPU's base product alone (csrc/cpu/product.cpp), for layers whose update is no plain LoRA's."""

import sys

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.ops.internals import empty_on_cpu

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


def packs(rows: int, weight: Tensor, dim: int) -> bool:
    """Whether a product of so many rows is faster with a packed W than PyTorch's.

    Args:
        weight: W [N, K].
        dim: which is summed. Where it has the stride 1 W must be turned, else it is packed as it lies, and is faster
            from a single row on (of PyTorch's time 0.3 to 0.8 in fp32, 0.5 to 1.05 in bf16, W from memory; EPYC 9005,
            2026-11-27).
    """
    return rows >= LEAST_ROWS or weight.stride(dim) != 1


def paying_rows(weights: Tensor) -> range:
    """With how many rows the product alone with a W of [..., N, K], which comes from memory, is faster than PyTorch's:
    few, all in fp32, and all where rows of memory are columns of W, as for dx; in bf16 it is up to half as slow again
    for many rows else (EPYC 9005, 2026-11-27)."""
    if not (weights.is_cpu and serves(weights.dtype)) or 0 in weights.shape:
        return range(0)
    single = weights.dtype is torch.float32
    return range(1, sys.maxsize if single or weights.stride(-1) != 1 else FEW_ROWS + 1)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """y = x Wt + bias [M, N] of x [M, K] and W [N, K]; into `y`, contiguous, if it is given. dx = dy W is the product
    with the transpose of W."""
    if y is None:
        M, N = x.shape[0], weight.shape[0]
        y = empty_on_cpu((M, N), (N, 1), x.dtype)
    _C.cpu_product(x=x, W=weight, bias=bias, y=y, threads=torch.get_num_threads())
    return y
