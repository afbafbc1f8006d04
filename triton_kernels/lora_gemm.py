"""lora_gemm: the base product with the low-rank update before its one store.

    y  [M, N] = x  [M, K] @ W [N, K]t + h  [M, R] @ B [N, R]t + bias       forward
    dx [M, K] = dy [M, N] @ W [N, K]  + keep * (dh [M, R] @ A [R, K])      backward: the same kernel, W and A as they are stored

In the kernel's words: out [M, N] = left [M, K] @ right + low [M, R] @ thin (+ bias), right stored [N, K] (RIGHT_NK) or [K, N].
Tile BLOCK_M x BLOCK_N, programs walk over tiles in groups of GROUP_M rows, so that a group's part of `left` stays in L2. TMA: left, right
and out are descriptors, whose bounds fill the tails with zeros; otherwise pointers with masks. Shared memory: NUM_STAGES tiles of left and
right. bf16, fp16, fp32; thin in the same dtype or fp32; fp32 accumulation, one rounding at the store. Any M, N, K, R.
The low-rank product comes after the loop over K: before it, it breaks the software pipeline (2.3 times the time on an H100, 2026-11-23).
"""

import triton
import triton.language as tl

from fused_lora.triton_kernels.dropout import keep_tile


@triton.jit
def _tile(src, row, col, rows, cols, stride, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, TMA: tl.constexpr):
    """The tile [BLOCK_ROW, BLOCK_COL] of a row-major matrix at (row, col), zeros outside."""
    if TMA:
        tile = src.load([row, col])
    else:
        offs_row, offs_col = row + tl.arange(0, BLOCK_ROW), col + tl.arange(0, BLOCK_COL)
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        tile = tl.load(src + offs_row.to(tl.int64)[:, None] * stride + offs_col[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _low_rank(acc, low, thin, offs_m, offs_n, M, N, stride_tn, stride_tr, R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """acc + low [M, R] @ thin, thin read through its strides: B [N, R] or A [R, N]."""
    for r in tl.static_range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        low_ptrs = low + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        thin_ptrs = thin + offs_r.to(tl.int64)[:, None] * stride_tr + offs_n.to(tl.int64)[None, :] * stride_tn
        low_tile = tl.load(low_ptrs, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :], other=0.0)
        thin_tile = tl.load(thin_ptrs, mask=(offs_r < R)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(low_tile, thin_tile.to(low_tile.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def lora_gemm_kernel(
    left, right, low, thin, bias, out, seed_ptr,
    M, N, K, stride_lm, stride_right, stride_tn, stride_tr, keep_factor, threshold,
    R: tl.constexpr, RIGHT_NK: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP_M * tiles_n)
        first_m = group * GROUP_M
        rows_in_group = min(tiles_m - first_m, GROUP_M)
        pid_m = first_m + tile % (GROUP_M * tiles_n) % rows_in_group
        pid_n = tile % (GROUP_M * tiles_n) // rows_in_group
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left_tile = _tile(left, m, k, M, K, stride_lm, BLOCK_M, BLOCK_K, TMA)
            if RIGHT_NK:
                right_tile = _tile(right, n, k, N, K, stride_right, BLOCK_N, BLOCK_K, TMA).T
            else:
                right_tile = _tile(right, k, n, K, N, stride_right, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
        offs_m, offs_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        if DROPOUT:
            update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            update = _low_rank(update, low, thin, offs_m, offs_n, M, N, stride_tn, stride_tr, R, BLOCK_R, PRECISION)
            keep = keep_tile(tl.load(seed_ptr), m, n, threshold, BLOCK_M, BLOCK_N)
            acc += tl.where(keep, update * keep_factor, 0.0)
        else:
            acc = _low_rank(acc, low, thin, offs_m, offs_n, M, N, stride_tn, stride_tr, R, BLOCK_R, PRECISION)
        if BIAS:
            acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            out.store([m, n], acc.to(out.dtype))
        else:
            out_ptrs = out + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
            tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
