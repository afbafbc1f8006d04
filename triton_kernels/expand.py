"""expand: the low-rank update alone, out = base + keep * (low @ thin).

    y  [M, N] = y0 [M, N] + h [M, R] @ B [N, R]t       lora_update's forward, over somebody else's base product
    dx [M, K] = keep * (dh [M, R] @ A [R, K])          the gradient of an input that only the low-rank path has

Tile BLOCK_M x BLOCK_N, one program each. Bound by memory: out is written once, base read once. low in bf16, fp16 or
fp32, thin in the same dtype or fp32, fp32 accumulation, one rounding at the store. Any M, N, R.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import ExpandConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.dropout import NO_DROPOUT, Dropout, keep_tile
from fused_lora.triton_kernels.launch import launch
from fused_lora.triton_kernels.lora_gemm import low_at, thin_at


@triton.jit
def expand_kernel(
    low,  # [M, R], contiguous
    thin,  # element (r, n) at r * stride_tr + n * stride_tn
    base,  # [M, N], row stride stride_bm, or None
    out,  # [M, N], contiguous
    seed_ptr,  # int64 [1], or None
    M,
    N,
    stride_tn,
    stride_tr,
    stride_bm,
    keep_factor,
    threshold,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    offs_m, offs_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        low_tile = low_at(low, offs_m, r, M, R, BLOCK_R)
        thin_tile = thin_at(thin, r, offs_n, N, stride_tn, stride_tr, R, BLOCK_R)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(low_tile, thin_tile.to(low_tile.dtype), acc, input_precision=PRECISION)
    if seed_ptr is not None:
        keep = keep_tile(tl.load(seed_ptr), m, n, threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * keep_factor, 0.0)
    if base is not None:
        acc += tl.load(base + rows * stride_bm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * N + offs_n[None, :], acc.to(out.dtype.element_ty), mask=mask)


def expand(
    low: Tensor,
    thin: Tensor,
    base: Tensor | None,
    config: ExpandConfig,
    *,
    thin_nr: bool,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """base + keep * (low @ thin): [M, N], in low's dtype.

    Args:
        low: [M, R], contiguous.
        thin: [N, R] if thin_nr, else [R, N], with any strides; low's dtype or fp32.
        base: [M, N], row-major, or None for zeros.
        dropout: of the product [M, N].
    """
    M, R = low.shape
    N, (stride_tn, stride_tr) = (thin.shape[0], thin.stride()) if thin_nr else (thin.shape[1], thin.stride()[::-1])
    out = torch.empty((M, N), dtype=low.dtype, device=low.device)
    grid = (cdiv(M, config.BLOCK_M), cdiv(N, config.BLOCK_N))
    stride_bm = 0 if base is None else base.stride(0)
    sizes = (M, N, stride_tn, stride_tr, stride_bm, dropout.factor, dropout.threshold)
    choices = {"R": R, "PRECISION": precision(low.dtype)}
    launch(expand_kernel, grid, (low, thin, base, out, dropout.seed, *sizes), choices | config.constexprs)
    return out
