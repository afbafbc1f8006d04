"""The CPU's kernel for the norms of the rows of W + s B A, or of B A alone (csrc/cpu/row_norm.cpp)."""

from array import array

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.backends import FUSED_DTYPES
from fused_lora.ops import internals

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}


def serves(lora_A: Tensor, lora_B: Tensor, weight: Tensor | None = None) -> bool:
    """Whether the kernel takes these: on the CPU, A [R, K] with a rank and B [N, R] in fp32, W [N, K] in a dtype that
    is fused and its neighbouring columns adjacent in memory."""
    if not lora_A.is_cpu or lora_A.dtype is not torch.float32 or lora_B.dtype is not torch.float32:
        return False
    return lora_A.shape[0] > 0 and (weight is None or (weight.dtype in FUSED_DTYPES and weight.stride(1) == 1))


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor | None]:
    """See `variants.dora.row_norm`; without gradients, and |W_i|^2 is computed on the way."""
    norm, count = _uninitialized(lora_B), array("q", (0,))
    W = weight.data_ptr(), weight.stride(0)
    _call(W, _CODE[weight.dtype], (norm.data_ptr(), count.buffer_info()[0]), lora_A, lora_B, scaling)
    if count[0] == 0:
        return norm, None
    empty = (norm == 0.0).to(norm.dtype)
    return norm + empty, empty


def product_norms(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """See `variants.allora.product_norms`."""
    norm = _uninitialized(lora_B)
    _call((0, 0), _CODE[torch.float32], (norm.data_ptr(), 0), lora_A, lora_B, 1.0)
    return norm


def _uninitialized(lora_B: Tensor) -> Tensor:
    return internals.empty_on_cpu((lora_B.shape[0],), (1,), torch.float32)


def _call(W, dtype, norm, lora_A, lora_B, scaling):
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    _C.cpu_row_norm(
        W=W,
        factors=(lora_A.data_ptr(), lora_B.data_ptr()),
        norm=norm,
        sizes=(lora_B.shape[0], lora_A.shape[1], lora_A.shape[0]),
        dtype=dtype,
        scaling=scaling,
        threads=torch.get_num_threads(),
    )
