"""The CPU's kernel for the norms of the rows of W + s B A (csrc/cpu/row_norm.cpp)."""

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.backends import FUSED_DTYPES
from fused_lora.ops import internals

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}


def refusal(weight: Tensor, squares: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """Why the kernel does not take these, or None."""
    if not weight.is_cpu:
        return f"CPU tensors; got {weight.device}"
    if weight.dtype not in FUSED_DTYPES:
        return f"W in bfloat16, float16 or float32; got {weight.dtype}"
    if any(t.dtype is not torch.float32 for t in (squares, lora_A, lora_B)):
        return f"A and B in float32; got {lora_A.dtype}, {lora_B.dtype}"
    if lora_A.shape[0] < 1:
        return "at least one rank"
    if weight.stride(1) != 1:
        return "W with neighbouring columns adjacent in memory"
    return None


def row_norm(weight: Tensor, squares: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """See `variants.dora.row_norm`; without gradients."""
    lora_A, lora_B, squares = lora_A.contiguous(), lora_B.contiguous(), squares.contiguous()
    (N, K), R = weight.shape, lora_A.shape[0]
    norm, empty = internals.empty_on_cpu((N,), (1,), torch.float32), internals.empty_on_cpu((N,), (1,), torch.float32)
    _C.cpu_row_norm(
        W=(weight.data_ptr(), weight.stride(0)),
        factors=(lora_A.data_ptr(), lora_B.data_ptr()),
        squares=squares.data_ptr(),
        norm=(norm.data_ptr(), empty.data_ptr()),
        sizes=(N, K, R),
        dtype=_CODE[weight.dtype],
        scaling=scaling,
        threads=torch.get_num_threads(),
    )
    return norm, empty
