"""shrink: a wide matrix times a thin one, low = factor * drop(left) @ down.

    h  [M, R] = factor * drop(x) [M, K] @ A [R, K]t      forward
    dh [M, R] = factor * dy [M, N] @ B [N, R]            backward: the same kernel, B read through its strides

Tile BLOCK_M x BLOCK_R, one program each, along the whole of K. Any M, K, R: every access is masked. left in bf16, fp16
or fp32, down in the same dtype or fp32 (rounded to left's dtype on the way), fp32 accumulation, one rounding at the
store.
BLOCK_M stays below 64: Hopper then uses mma.sync. A wgmma with its masked left operand in registers is what ptxas
before 13.3 can corrupt inside a pipelined loop; the kernel is bound by memory anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import ShrinkConfig
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.dropout import NO_DROPOUT, Dropout, keep_tile
from fused_lora.triton_kernels.launch import launch


@triton.jit
def shrink_kernel(
    left,  # [M, K], row stride stride_lm
    down,  # element (k, r) at k * stride_dk + r * stride_dr
    low,  # [M, R], contiguous
    seed_ptr,  # int64 [1], or None
    M,
    K,
    stride_lm,
    stride_dr,
    stride_dk,
    factor,
    threshold,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_m, pid_r = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    left_rows = left + offs_m.to(tl.int64)[:, None] * stride_lm  # [BLOCK_M, 1]
    down_cols = down + offs_r[None, :] * stride_dr  # [1, BLOCK_R]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        left_tile = tl.load(left_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        down_ptrs = down_cols + offs_k.to(tl.int64)[:, None] * stride_dk  # [BLOCK_K, BLOCK_R]
        down_tile = tl.load(down_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            keep = keep_tile(seed, pid_m * BLOCK_M, k, threshold, BLOCK_M, BLOCK_K)
            left_tile = tl.where(keep, left_tile, tl.zeros_like(left_tile))
        acc = tl.dot(left_tile, down_tile.to(left_tile.dtype), acc, input_precision=PRECISION)
    low_ptrs = low + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(low_ptrs, (acc * factor).to(low.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def shrink(
    left: Tensor, down: Tensor, factor: float, config: ShrinkConfig, *, down_rk: bool, dropout: Dropout = NO_DROPOUT
) -> Tensor:
    """factor * drop(left) @ down: low [M, R], in left's dtype.

    Args:
        left: [M, K], row-major.
        down: [R, K] if down_rk, else [K, R], with any strides; left's dtype or fp32.
        dropout: of left.
    """
    M, K = left.shape
    R, (stride_dr, stride_dk) = (down.shape[0], down.stride()) if down_rk else (down.shape[1], down.stride()[::-1])
    low = torch.empty((M, R), dtype=left.dtype, device=left.device)
    grid = (triton.cdiv(M, config.BLOCK_M), triton.cdiv(R, config.BLOCK_R))
    tensors = (left, down, low, dropout.seed)
    sizes = (M, K, left.stride(0), stride_dr, stride_dk, factor * dropout.factor, dropout.threshold)
    choices = {"R": R, "DROPOUT": dropout.seed is not None, "PRECISION": precision(left.dtype)}
    launch(shrink_kernel, grid, tensors + sizes, choices | config.constexprs)
    return low
