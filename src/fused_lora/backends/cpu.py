"""CPU back end: C++ kernels (csrc/cpu) for everything low-rank, PyTorch's own GEMM for the base product.

The kernel writes y = h Bt + bias first and the GEMM adds x Wt into it, so the update costs no second pass over y; dx likewise.
"""

import torch

from fused_lora import _C
from fused_lora.reference import dropout_threshold

_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t with neighbouring columns adjacent in memory; a row stride is fine as it is."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _ptr(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    x, lora_A, lora_B = _rows(x), lora_A.contiguous(), lora_B.contiguous()
    (M, K), N, R = x.shape, weight.shape[0], lora_A.shape[0]
    y, h = torch.empty(M, N, dtype=x.dtype), torch.empty(M, R, dtype=x.dtype)
    _C.cpu_forward(
        x.data_ptr(), x.stride(0), lora_A.data_ptr(), lora_B.data_ptr(), _ptr(None if bias is None else bias.contiguous()), h.data_ptr(), y.data_ptr(),
        M, N, K, R, _CODE[x.dtype], _CODE[lora_A.dtype], scaling, _ptr(seed), dropout_threshold(dropout_p) if dropout_p else 0, torch.get_num_threads(),
    )  # fmt: skip
    return y.addmm_(x, weight.t()), h


def backward(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """[dx, dA, dB, dbias], None where `needs` says so; see `reference.backward`."""
    dy, lora_A, lora_B = _rows(dy), lora_A.contiguous(), lora_B.contiguous()
    (M, N), (R, K) = dy.shape, lora_A.shape
    need_x, need_A, need_B, need_bias = needs
    dx = torch.empty(M, K, dtype=dy.dtype) if need_x else None
    dA = torch.empty_like(lora_A) if need_A else None
    dB = torch.empty_like(lora_B) if need_B else None
    dbias = torch.empty(N, dtype=dy.dtype) if need_bias else None
    x = _rows(x) if need_A else None
    h = h.contiguous() if need_B else None
    _C.cpu_backward(
        dy.data_ptr(), dy.stride(0), _ptr(x), x.stride(0) if need_A else 0, lora_A.data_ptr(), lora_B.data_ptr(), _ptr(h),
        _ptr(dx), _ptr(dA), _ptr(dB), _ptr(dbias), M, N, K, R,
        _CODE[dy.dtype], _CODE[lora_A.dtype], scaling, _ptr(seed), dropout_threshold(dropout_p) if dropout_p else 0, torch.get_num_threads(),
    )  # fmt: skip
    return [dx.addmm_(dy, weight) if need_x else None, dA, dB, dbias]
