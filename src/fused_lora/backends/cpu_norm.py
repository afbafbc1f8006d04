"""The CPU's kernel for the norms of the rows of W + s B A, or of B A alone (csrc/cpu/row_norm.cpp)."""

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.backends import FUSED_DTYPES
from fused_lora.ops.internals import empty_on_cpu


def serves(lora_A: Tensor, lora_B: Tensor, weight: Tensor | None = None) -> bool:
    """Whether the kernel takes these: on the CPU, A [R, K] with a rank and B [N, R] in fp32, W [N, K] in a dtype that
    is fused and its neighbouring columns adjacent in memory."""
    if not lora_A.is_cpu or lora_A.dtype is not torch.float32 or lora_B.dtype is not torch.float32:
        return False
    return lora_A.shape[0] > 0 and (weight is None or (weight.dtype in FUSED_DTYPES and weight.stride(1) == 1))


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor | None]:
    """See `variants.dora.row_norm`; without gradients, and |W_i|^2 is computed on the way."""
    norm, empty_rows = _norm(weight, lora_A, lora_B, scaling)
    if not empty_rows:
        return norm, None
    empty = (norm == 0.0).to(norm.dtype)
    return norm + empty, empty


def product_norms(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """See `variants.allora.product_norms`."""
    return _norm(None, lora_A, lora_B, 1.0)[0]


def _norm(weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, int]:
    norm, threads = empty_on_cpu((lora_B.shape[0],), (1,), torch.float32), torch.get_num_threads()
    return norm, _C.cpu_row_norm(W=weight, A=lora_A, B=lora_B, norm=norm, scaling=scaling, threads=threads)
