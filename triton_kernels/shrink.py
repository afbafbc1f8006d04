"""shrink: a wide matrix times the thin one, h = factor * drop(x) At.

    h  [M, R] = factor * drop(x)  [M, K] @ A  [R, K]t      forward
    dh [M, R] = factor * dy       [M, N] @ B  [N, R]       backward: the same kernel, B read through its strides

Tile BLOCK_M x BLOCK_R, one program each, along the whole of K. Any M, K, R: every access is masked. x in bf16, fp16 or
    fp32, A and B in
the same dtype or fp32 (rounded to x's dtype on the way), fp32 accumulation, one rounding at the store.
BLOCK_M stays below 64: Hopper then uses mma.sync. A wgmma with its masked left operand in registers is what ptxas
    before 13.3 can
corrupt inside a pipelined loop; the kernel is bound by memory anyway.
"""

import triton
import triton.language as tl
from fused_lora.triton_kernels.dropout import keep_tile


@triton.jit
def shrink_kernel(
    x,
    thin,
    h,
    seed_ptr,
    M,
    K,
    stride_xm,
    stride_tr,
    stride_tk,
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
    x_rows = x + offs_m.to(tl.int64)[:, None] * stride_xm  # [BLOCK_M, 1]
    thin_rows = thin + offs_r[None, :] * stride_tr  # [1, BLOCK_R]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x_tile = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        thin_tile = tl.load(
            thin_rows + offs_k.to(tl.int64)[:, None] * stride_tk, mask=mask_k[:, None] & mask_r[None, :], other=0.0
        )
        if DROPOUT:
            x_tile = tl.where(
                keep_tile(seed, pid_m * BLOCK_M, k, threshold, BLOCK_M, BLOCK_K), x_tile, tl.zeros_like(x_tile)
            )
        acc = tl.dot(x_tile, thin_tile.to(x_tile.dtype), acc, input_precision=PRECISION)
    h_ptrs = h + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(h_ptrs, (acc * factor).to(h.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
