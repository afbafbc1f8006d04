"""Triton back end, on every GPU that Triton serves; also in Triton's interpreter.

    forward    shrink (h), lora_gemm (y); or lora_gemm_shrink (both)
    backward   dy_pass (dh and dB), or shrink (dh) and wgrad (dB); lora_gemm (dx); wgrad (dA); or lora_gemm_shrink (dh
               and dx) where dB is not needed. What splits dy or x over its rows or columns adds a launch that sums fp32
               slabs.

Which launches serve a call is a plan of triton_kernels/configs.py, where the forms that no GPU has timed are planned on
request only. Each launch is a function beside its kernel. The twin of csrc/cuda/lora.cpp.
"""

import torch
import triton

from fused_lora.backends import FUSED_DTYPES, Request, only_plain
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.reference import Gradients
from fused_lora.triton_kernels.configs import backward_plan, forward_plan
from fused_lora.triton_kernels.device import current, facts
from fused_lora.triton_kernels.dropout import NO_DROPOUT, Dropout
from fused_lora.triton_kernels.dy_pass import dy_pass
from fused_lora.triton_kernels.lora_gemm import lora_gemm
from fused_lora.triton_kernels.lora_gemm_shrink import lora_gemm_shrink
from fused_lora.triton_kernels.shrink import shrink
from fused_lora.triton_kernels.wgrad import wgrad


def _row_major(t: torch.Tensor) -> torch.Tensor:
    """t with neighbouring columns adjacent in memory and rows apart; any row stride is fine as it is."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _dropout(dropout_p: float, seed: torch.Tensor | None) -> Dropout:
    return NO_DROPOUT if seed is None else Dropout(seed, dropout_threshold(dropout_p))


def refusal(request: Request) -> str | None:
    """See `backends`."""
    interpreting = triton.knobs.runtime.interpret
    if request.device.type not in ("cuda", "xpu") and not (interpreting and request.device.type == "cpu"):
        return f"GPU tensors (or CPU tensors with TRITON_INTERPRET=1 in the environment); got {request.device}"
    if request.dtype not in FUSED_DTYPES:
        return f"bfloat16, float16 and float32; got {request.dtype}"
    return only_plain(request)


def plans(request: Request) -> tuple[str, ...]:
    """See `backends`."""
    return ("",)


def summary(request: Request, plan: str) -> str:
    """See `backends`."""
    return "Triton kernels; the compiled CUDA kernels run on request with backend='cuda' until they are measured"


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan, launches=forward_plan):
    """y [M, N] and h [M, R]; see `reference.forward`.

    Args:
        launches: chooses the launches, from the arguments of `configs.forward_plan`.
    """
    x, weight, lora_A, lora_B = _row_major(x), _row_major(weight), _row_major(lora_A), _row_major(lora_B)
    (M, K), (N, R) = x.shape, lora_B.shape
    if M == 0:
        return x.new_empty((0, N)), x.new_empty((0, R))
    bias = None if bias is None else bias.contiguous()
    with current(x.device):
        p = launches(M, N, K, R, x.element_size(), seed is not None, facts(x.device))
        if p.lora_gemm_shrink is not None:
            return lora_gemm_shrink(x, weight, lora_A, lora_B, bias, scaling, p.lora_gemm_shrink, right_nk=True)
        h = shrink(x, lora_A, scaling, p.shrink, down_rk=True, dropout=_dropout(dropout_p, seed))
        return lora_gemm(x, weight, h, lora_B, bias, p.lora_gemm, right_nk=True), h


def backward(
    dy,
    dh,
    x,
    weight,
    lora_A,
    lora_B,
    h,
    y,
    bias,
    scaling,
    dropout_p,
    seed,
    needs,
    variant,
    plan,
    launches=backward_plan,
):
    """The gradients that `needs` asks for, but for the weight's; see `reference.backward`.

    Args:
        launches: chooses the launches, from the arguments of `configs.backward_plan`.
    """
    need_x, need_A, need_B, need_bias = needs.x, needs.lora_A, needs.lora_B, needs.bias
    dy, weight, lora_A, lora_B = _row_major(dy), _row_major(weight), _row_major(lora_A), _row_major(lora_B)
    (M, N), (R, K) = dy.shape, lora_A.shape
    if M == 0:
        return Gradients(
            x=dy.new_empty((0, K)) if need_x else None,
            lora_A=lora_A.new_zeros((R, K)) if need_A else None,
            lora_B=lora_B.new_zeros((N, R)) if need_B else None,
            bias=dy.new_zeros((N,)) if need_bias else None,
        )
    dropout, h = _dropout(dropout_p, seed), h.contiguous() if need_B else None
    dx = dh = dA = dB = None
    with current(dy.device):
        p = launches(M, N, K, R, dy.element_size(), seed is not None, need_x, need_A, need_B, facts(dy.device))
        if p.lora_gemm_shrink is not None:
            dx, dh = lora_gemm_shrink(dy, weight, lora_B, lora_A, None, scaling, p.lora_gemm_shrink, right_nk=False)
        if p.dy_pass is not None:
            dh, dB = dy_pass(dy, lora_B, h, scaling, p.dy_pass)
        if p.shrink is not None:
            dh = shrink(dy, lora_B, scaling, p.shrink, down_rk=False)
        if p.wgrad_B is not None:
            dB = wgrad(h, dy, lora_B.dtype, p.wgrad_B, transposed=True)
        if p.lora_gemm is not None:
            dx = lora_gemm(dy, weight, dh, lora_A, None, p.lora_gemm, right_nk=False, dropout=dropout)
        if p.wgrad_A is not None:
            dA = wgrad(dh, _row_major(x), lora_A.dtype, p.wgrad_A, dropout=dropout)
        return Gradients(x=dx, lora_A=dA, lora_B=dB, bias=dy.sum(0) if need_bias else None)
