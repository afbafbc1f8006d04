"""CPU back end: C++ kernels (csrc/cpu) for everything low-rank, and for the base product in one plan of two.

inside    our own product, in one pass with the update: fp32 by csrc/cpu/lora_gemm.cpp, bf16 by amx_gemm.cpp on AMX
around    PyTorch's own GEMM writes y (dx), and the kernel adds the update into it

`update` and `grouped_update`, whose base product somebody else has made, have the second plan only.
"""

import torch
from torch.nn import functional as F

from fused_lora import _C
from fused_lora.backends import FUSED_DTYPES, GROUPED, UPDATE, Request, only_plain
from fused_lora.backends.cpu_grouped import grouped_update as grouped_update
from fused_lora.backends.cpu_grouped import grouped_update_backward as grouped_update_backward
from fused_lora.ops import internals
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.internals import linear_with_bias
from fused_lora.ops.reference import Gradients

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}
_FEATURES = _C.cpu_features()
_LEAST_ROWS = 4  # below, packing W costs more than MKL's product without it (EPYC 9004, 2026-11-24)


def refusal(request: Request) -> str | None:
    """See `backends`."""
    if request.device.type != "cpu":
        return f"CPU tensors; got {request.device}"
    if request.dtype not in FUSED_DTYPES:
        return f"bfloat16, float16 and float32; got {request.dtype}"
    return None if request.optional in (UPDATE, GROUPED) else only_plain(request)


def plans(request: Request) -> tuple[str, ...]:
    """See `backends`. Where there are instructions for it "inside" is as fast as PyTorch's product without the update,
    or faster (bench/NOTES.md)."""
    if request.M < _LEAST_ROWS or request.dtype is torch.float16 or request.optional in (UPDATE, GROUPED):
        return ("around",)
    if not request.aligned:  # a transposed weight, which PyTorch's product takes as it lies and ours would copy
        return ("around",)
    if request.dtype is torch.bfloat16:
        return ("inside", "around") if _FEATURES["amx"] else ("around",)
    return ("inside", "around") if _FEATURES["avx2"] else ("around", "inside")


def summary(request: Request, plan: str) -> str:
    """See `backends`."""
    return "C++ kernels, the base product inside" if plan == "inside" else "C++ kernels around PyTorch's own GEMM"


def _rows(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """t, not contiguous, with neighbouring columns adjacent in memory, and its row stride, which may be any."""
    return (t, t.stride(0)) if t.stride(1) == 1 else (t.contiguous(), t.shape[1])


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    if plan == "inside":
        y = internals.empty_on_cpu((x.shape[0], weight.shape[0]), (weight.shape[0], 1), x.dtype)
        return y, _forward(y, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    y = F.linear(x, weight) if bias is None else linear_with_bias(x, weight, bias)
    return y, _forward(y, x, None, lora_A, lora_B, None, scaling, dropout_p, seed)


def update(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    """y [M, N] with the update in a tensor of its own, and h [M, R]; see `reference.update`."""
    y = y.clone(memory_format=torch.contiguous_format)
    return y, _forward(y, x, None, lora_A, lora_B, None, scaling, dropout_p, seed)


def _forward(y, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    """h [M, R]; y [M, N], contiguous, is written or, without the weight, updated."""
    lora_A, lora_B, dtype = lora_A.contiguous(), lora_B.contiguous(), x.dtype
    (M, K), (N, R) = x.shape, lora_B.shape
    x, ldx = (x, K) if x.is_contiguous() else _rows(x)
    h = internals.empty_on_cpu((M, R), (R, 1), dtype)
    W_ptr = ldw = bias_ptr = 0
    if weight is not None:
        weight, ldw = (weight, K) if weight.is_contiguous() else _rows(weight)
        W_ptr = weight.data_ptr()
    if bias is not None:
        bias = bias.contiguous()
        bias_ptr = bias.data_ptr()
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    _C.cpu_forward(
        x=(x.data_ptr(), ldx),
        W=(W_ptr, ldw),
        A=lora_A.data_ptr(),
        B=lora_B.data_ptr(),
        bias=bias_ptr,
        h=h.data_ptr(),
        y=y.data_ptr(),
        sizes=(M, N, K, R),
        dtypes=(_CODE[dtype], _CODE[lora_A.dtype]),
        scaling=scaling,
        dropout=dropout,
        threads=torch.get_num_threads(),
    )
    return h


def backward(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan):
    """The gradients that `needs` asks for, but for the weight's; see `reference.backward`."""
    dx = None
    if needs.x and plan == "inside":
        dx = internals.empty_on_cpu((dy.shape[0], weight.shape[1]), (weight.shape[1], 1), dy.dtype)
    elif needs.x:
        dx, weight = dy.mm(weight), None
    return _backward(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs)


def update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """The gradients that `needs` asks for; see `reference.update_backward`."""
    dx = dy.new_zeros((dy.shape[0], lora_A.shape[1])) if needs.x else None
    return _backward(dx, dy, x, None, lora_A, lora_B, h, scaling, dropout_p, seed, needs)


def _backward(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """The gradients that `needs` asks for; dx [M, K], contiguous, is written or, without the weight, updated."""
    lora_A, lora_B, dtype, adapter_dtype = lora_A.contiguous(), lora_B.contiguous(), dy.dtype, lora_A.dtype
    (M, N), (R, K) = dy.shape, lora_A.shape
    dy, lddy = (dy, N) if dy.is_contiguous() else _rows(dy)
    dA = dB = dbias = None
    dx_ptr = dA_ptr = dB_ptr = dbias_ptr = x_ptr = ldx = h_ptr = W_ptr = ldw = 0
    if needs.x:
        dx_ptr = dx.data_ptr()
        if weight is not None:
            weight, ldw = (weight, K) if weight.is_contiguous() else _rows(weight)
            W_ptr = weight.data_ptr()
    if needs.lora_A:
        x, ldx = (x, K) if x.is_contiguous() else _rows(x)
        dA = internals.empty_on_cpu((R, K), (K, 1), adapter_dtype)
        x_ptr, dA_ptr = x.data_ptr(), dA.data_ptr()
    if needs.lora_B:
        h, dB = h.contiguous(), internals.empty_on_cpu((N, R), (R, 1), adapter_dtype)
        h_ptr, dB_ptr = h.data_ptr(), dB.data_ptr()
    if needs.bias:
        dbias = internals.empty_on_cpu((N,), (1,), dtype)
        dbias_ptr = dbias.data_ptr()
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    _C.cpu_backward(
        dy=(dy.data_ptr(), lddy),
        x=(x_ptr, ldx),
        W=(W_ptr, ldw),
        A=lora_A.data_ptr(),
        B=lora_B.data_ptr(),
        h=h_ptr,
        dx=dx_ptr,
        dA=dA_ptr,
        dB=dB_ptr,
        dbias=dbias_ptr,
        sizes=(M, N, K, R),
        dtypes=(_CODE[dtype], _CODE[adapter_dtype]),
        scaling=scaling,
        dropout=dropout,
        threads=torch.get_num_threads(),
    )
    return Gradients(dx, None, dA, dB, dbias)
