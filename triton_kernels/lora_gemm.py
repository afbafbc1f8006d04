"""lora_gemm: the base product with the low-rank update before its one store.

    y  [M, N] = x  [M, K] @ W [N, K]t + h  [M, R] @ B [N, R]t + bias       forward
    dx [M, K] = dy [M, N] @ W [N, K]  + keep * (dh [M, R] @ A [R, K])      backward: the same kernel, W and A as stored

In the kernel's words: out = left right + low thin + bias, right stored [N, K] (RIGHT_NK) or [K, N]; forward also out =
out_scale * (left right + low thin) + bias. Tile BLOCK_M x BLOCK_N, programs walk over tiles in groups of GROUP_M rows,
so that a group's part of `left` stays in L2. TMA: left, right and out are descriptors, whose bounds fill the tails with
zeros; otherwise pointers with masks. Shared memory: num_stages tiles of left and right, and with TMA the out tile.
bf16, fp16, fp32; thin in the same dtype or fp32; fp32 accumulation, one rounding at the store. Any M, N, K, R.
The low-rank product comes after the loop over K: before it, it breaks the software pipeline (2.3 times the time on an
H100, 2026-11-23). After it, nothing hides the latency of its loads, 25 us of 383 there. PREFETCH issues those of the
first rank block before the loop and keeps them in registers, which in the compiled code leaves the loop as it is, and
is 1 to 3 % faster (configs.py). Its left operand reaches wgmma through registers, outside of any pipelined loop
(shrink.py says why that matters). lora_gemm_shrink.py has the form that makes `low` in the same launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.triton_kernels.configs import GemmConfig
from fused_lora.triton_kernels.device import precision, tma_ready
from fused_lora.triton_kernels.dropout import NO_DROPOUT, Dropout, keep_tile
from fused_lora.triton_kernels.launch import launch


@triton.jit
def tile_at(src, row, col, rows, cols, stride, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, TMA: tl.constexpr):
    """The tile [BLOCK_ROW, BLOCK_COL] of a row-major matrix at (row, col), zeros outside."""
    if TMA:
        tile = src.load([row, col])
    else:
        offs_row, offs_col = row + tl.arange(0, BLOCK_ROW), col + tl.arange(0, BLOCK_COL)
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        tile = tl.load(src + offs_row.to(tl.int64)[:, None] * stride + offs_col[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def right_at(
    right, n, k, N, K, stride, RIGHT_NK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """The tile [BLOCK_K, BLOCK_N] of a right operand stored [N, K] or [K, N]."""
    if RIGHT_NK:
        tile = tile_at(right, n, k, N, K, stride, BLOCK_N, BLOCK_K, TMA).T
    else:
        tile = tile_at(right, k, n, K, N, stride, BLOCK_K, BLOCK_N, TMA)
    return tile


@triton.jit
def position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: down the rows of a group, then the next column."""
    group = tile // (GROUP_M * tiles_n)
    rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows_in_group, within // rows_in_group


@triton.jit
def low_at(low, offs_m, r, M, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tile [BLOCK_M, BLOCK_R] of low [M, R]."""
    offs_r = r + tl.arange(0, BLOCK_R)
    low_ptrs = low + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    return tl.load(low_ptrs, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :], other=0.0)


@triton.jit
def thin_at(thin, r, offs_n, N, stride_tn, stride_tr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tile [BLOCK_R, BLOCK_N] of thin, which is read through its strides: B [N, R] or A [R, N]."""
    offs_r = r + tl.arange(0, BLOCK_R)
    thin_ptrs = thin + offs_r.to(tl.int64)[:, None] * stride_tr + offs_n.to(tl.int64)[None, :] * stride_tn
    return tl.load(thin_ptrs, mask=(offs_r < R)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def arrived(tile, offs_row, offs_col, rows, cols, dtype: tl.constexpr):
    """The tile, in dtype, as an operand from here on: the compiler copies an operand to shared memory where its value
    is made, and for one that was loaded before the loop it would wait there. The select, which changes nothing, is made
    here."""
    return tl.where((offs_row < rows)[:, None] & (offs_col < cols)[None, :], tile.to(dtype), 0.0)


@triton.jit
def store_at(out, acc, out_scale, bias, m, n, offs_m, offs_n, M, N, BIAS: tl.constexpr, TMA: tl.constexpr):
    """out's tile at (m, n) = out_scale * acc + bias, in out's dtype."""
    if out_scale is not None:
        acc *= tl.load(out_scale + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if TMA:
        out.store([m, n], acc.to(out.dtype))
    else:
        out_ptrs = out + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def lora_gemm_kernel(
    left,  # [M, K], row stride stride_lm; or its descriptor
    right,  # [N, K] or [K, N], row stride stride_right; or its descriptor
    low,  # [M, R], contiguous
    thin,  # element (r, n) at r * stride_tr + n * stride_tn
    bias,  # [N], or None
    out,  # [M, N], contiguous; or its descriptor
    seed_ptr,  # int64 [1], or None
    out_scale,  # [N], or None
    M,
    N,
    K,
    stride_lm,
    stride_right,
    stride_tn,
    stride_tr,
    keep_factor,
    threshold,
    R: tl.constexpr,
    RIGHT_NK: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
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
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = position(tile, tiles_m, tiles_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        if PREFETCH:
            offs_m, offs_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
            low_tile = low_at(low, offs_m, 0, M, R, BLOCK_R)
            thin_tile = thin_at(thin, 0, offs_n, N, stride_tn, stride_tr, R, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left_tile = tile_at(left, m, k, M, K, stride_lm, BLOCK_M, BLOCK_K, TMA)
            right_tile = right_at(right, n, k, N, K, stride_right, RIGHT_NK, BLOCK_N, BLOCK_K, TMA)
            acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
        # Anew: kept through the loop they cost registers.
        offs_m, offs_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        if DROPOUT:
            update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        else:
            update = acc
        if PREFETCH:
            offs_r = tl.arange(0, BLOCK_R)
            low_tile = arrived(low_tile, offs_m, offs_r, M, R, dtype)
            thin_tile = arrived(thin_tile, offs_r, offs_n, R, N, dtype)
            update = tl.dot(low_tile, thin_tile, update, input_precision=PRECISION)
        for r in range(BLOCK_R if PREFETCH else 0, R, BLOCK_R):
            low_tile = low_at(low, offs_m, r, M, R, BLOCK_R)
            thin_tile = thin_at(thin, r, offs_n, N, stride_tn, stride_tr, R, BLOCK_R).to(dtype)
            update = tl.dot(low_tile, thin_tile, update, input_precision=PRECISION)
        if DROPOUT:
            keep = keep_tile(tl.load(seed_ptr), m, n, threshold, BLOCK_M, BLOCK_N)
            acc += tl.where(keep, update * keep_factor, 0.0)
        else:
            acc = update
        store_at(out, acc, out_scale, bias, m, n, offs_m, offs_n, M, N, BIAS, TMA)


def described(config: GemmConfig, right_nk: bool, left: Tensor, right: Tensor, out: Tensor) -> list[TensorDescriptor]:
    """Descriptors of a GEMM's tensors with the blocks that it loads and stores."""
    c = config
    of_right = [c.BLOCK_N, c.BLOCK_K] if right_nk else [c.BLOCK_K, c.BLOCK_N]
    blocks = ([c.BLOCK_M, c.BLOCK_K], of_right, [c.BLOCK_M, c.BLOCK_N])
    return [TensorDescriptor.from_tensor(t, block) for t, block in zip((left, right, out), blocks)]


def lora_gemm(
    left: Tensor,
    right: Tensor,
    low: Tensor,
    thin: Tensor,
    bias: Tensor | None,
    config: GemmConfig,
    *,
    right_nk: bool,
    dropout: Dropout = NO_DROPOUT,
    out_scale: Tensor | None = None,
) -> Tensor:
    """out_scale * (left @ right + keep * (low @ thin)) + bias: out [M, N], in left's dtype.

    Args:
        left: [M, K], row-major.
        right: [N, K] if right_nk, else [K, N], row-major, in left's dtype.
        low: [M, R], contiguous, in left's dtype.
        thin: [N, R] if right_nk, else [R, N], with any strides; left's dtype or fp32.
        bias: [N], contiguous, or None.
        dropout: of the low-rank term [M, N].
        out_scale: [N], contiguous, or None.
    """
    (M, K), R = left.shape, low.shape[1]
    N, (stride_tn, stride_tr) = (right.shape[0], thin.stride()) if right_nk else (right.shape[1], thin.stride()[::-1])
    out = torch.empty((M, N), dtype=left.dtype, device=left.device)
    tma = config.tma and tma_ready(left) and tma_ready(right) and tma_ready(out)
    left_tiles, right_tiles, out_tiles = described(config, right_nk, left, right, out) if tma else (left, right, out)
    tensors = (left_tiles, right_tiles, low, thin, bias, out_tiles, dropout.seed, out_scale)
    sizes = (M, N, K, left.stride(0), right.stride(0), stride_tn, stride_tr, dropout.factor, dropout.threshold)
    choices = {"R": R, "RIGHT_NK": right_nk, "BIAS": bias is not None, "DROPOUT": dropout.seed is not None, "TMA": tma}
    choices["PRECISION"] = precision(left.dtype)
    launch(lora_gemm_kernel, (config.programs,), tensors + sizes, choices | config.constexprs)
    return out
