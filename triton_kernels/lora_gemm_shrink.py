"""lora_gemm_shrink: lora_gemm that makes its own low, so left is read once and the two are one launch.

    h  = scaling * x  @ A [R, K]t,   y  = x  @ W [N, K]t + h  @ B [N, R]t + bias       forward
    dh = scaling * dy @ B [N, R],    dx = dy @ W [N, K]  + dh @ A [R, K]               backward

In the kernel's words, beside lora_gemm's: low [M, R] = factor * left @ rank, rank stored as right is, [R, K] (RIGHT_NK)
or [K, R]. The tiles of out's first column also accumulate low from the left tiles they stage anyway, store it and raise
a flag for their rows; the other tiles wait for it before the update. `state` is int32 [1 + row blocks], zeroed before
each launch in stream order: the next tile's number, flags.
Progress, with any number of programs resident: numbers are drawn from the counter, the first column's first, and a tile
    waits only for a
lower number of the first column, which a running program drew and which itself never waits. Numbers are drawn a tile
ahead, to hide the latency of it; that changes nothing, since a program that holds a first-column number in reserve is
itself at work on one. low is stored and loaded by ordinary instructions, ordered by barrier, release and acquire; TMA
would need a proxy fence. Tile, dtypes, numerics as lora_gemm, R up to BLOCK_R, rank in left's dtype. No dropout: a
masked left operand would pass through registers into a pipelined wgmma (shrink.py). On an H100, Triton 3.6, 8192 x 4096
x 4096, bf16, R = 16, a probe of this form took 396 us, shrink and lora_gemm 35 + 383 us (2026-11-23); this kernel's own
measurement is pending.
"""

import triton
import triton.language as tl
from fused_lora.triton_kernels.lora_gemm import arrived, low_at, position, right_at, store_at, thin_at, tile_at


@triton.jit
def lora_gemm_shrink_kernel(
    left,
    right,
    rank,
    thin,
    bias,
    out,
    low,
    state,
    M,
    N,
    K,
    stride_lm,
    stride_right,
    stride_rank,
    stride_tn,
    stride_tr,
    factor,
    R: tl.constexpr,
    RIGHT_NK: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = low.dtype.element_ty
    tile = tl.atomic_add(state, 1, sem="relaxed")
    while tile < tiles_m * tiles_n:
        next_tile = tl.atomic_add(state, 1, sem="relaxed")
        if tile < tiles_m:
            pid_m, pid_n = tile, 0
        else:
            pid_m, pid_n = position(tile - tiles_m, tiles_m, tiles_n - 1, GROUP_M)
            pid_n += 1
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m, offs_n, offs_r = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        if PREFETCH:
            thin_tile = thin_at(thin, 0, offs_n, N, stride_tn, stride_tr, R, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        flag = state + 1 + pid_m
        if tile < tiles_m:
            low_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in range(0, K, BLOCK_K):
                left_tile = tile_at(left, m, k, M, K, stride_lm, BLOCK_M, BLOCK_K, TMA)
                right_tile = right_at(right, n, k, N, K, stride_right, RIGHT_NK, BLOCK_N, BLOCK_K, TMA)
                rank_tile = right_at(rank, 0, k, R, K, stride_rank, RIGHT_NK, BLOCK_R, BLOCK_K, TMA)
                acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
                low_acc = tl.dot(left_tile, rank_tile, low_acc, input_precision=PRECISION)
            low_ptrs = low + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
            tl.store(low_ptrs, (low_acc * factor).to(dtype), mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
            tl.debug_barrier()  # the release below is one thread's: first the stores of all of them
            tl.atomic_xchg(flag, 1, sem="release")
        else:
            for k in range(0, K, BLOCK_K):
                left_tile = tile_at(left, m, k, M, K, stride_lm, BLOCK_M, BLOCK_K, TMA)
                acc = tl.dot(
                    left_tile,
                    right_at(right, n, k, N, K, stride_right, RIGHT_NK, BLOCK_N, BLOCK_K, TMA),
                    acc,
                    input_precision=PRECISION,
                )
            while tl.atomic_add(flag, 0, sem="acquire") == 0:
                pass
        if not PREFETCH:
            thin_tile = thin_at(thin, 0, offs_n, N, stride_tn, stride_tr, R, BLOCK_R)
        low_tile = low_at(low, offs_m, 0, M, R, BLOCK_R)
        acc = tl.dot(low_tile, arrived(thin_tile, offs_r, offs_n, R, N, dtype), acc, input_precision=PRECISION)
        store_at(out, acc, bias, m, n, offs_m, offs_n, M, N, BIAS, TMA)
        tile = next_tile
