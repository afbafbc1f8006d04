"""grouped_shrink: shrink with a factor of its own for each group of rows.

    h  [P, R], position p of group g: s_g * drop(x[rows[p]]) @ A_gt      forward
    dh [P, R], position p of group g: s_g * dy[rows[p]] @ B_g            backward: the same kernel

Columns beyond a group's rank are zero. Tile BLOCK_M positions of one group x BLOCK_R, one program each (see
grouped.py), along the whole of K; a program whose ranks its group has not only writes the zeros. left in bf16, fp16 or
fp32, the factors in the same dtype or fp32, fp32 accumulation. BLOCK_M stays below 64: see shrink.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import ShrinkConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.dropout import keep_rows
from fused_lora.triton_kernels.grouped import Factors, Groups, factor_at, item_of, rank_of, rows_at
from fused_lora.triton_kernels.launch import launch


@triton.jit
def grouped_shrink_kernel(
    left,  # [M, K], row stride stride_lm
    down,  # element (k, r) of group g at g * stride_dg + k * stride_dk + r * stride_dr
    table,  # int64 [G], addresses instead of g * stride_dg, or None
    low,  # [P, R], contiguous
    offsets,  # int [G + 1]
    rows,  # int [P], or None
    ranks,  # int32 [G], in multiples of UNIT, or None
    factors,  # fp32 [G]
    seed_ptr,  # int64 [1], or None
    thresholds,  # int32 [G], or None
    P,
    G,
    K,
    stride_lm,
    stride_dg,
    stride_dr,
    stride_dk,  # None: the group's rank
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_r = tl.program_id(1)
    g, _, end, first = item_of(offsets, tl.program_id(0), P, G, BLOCK_M, BLOCK_G)
    if first < end:
        rank = rank_of(ranks, g, R, UNIT)
        positions, offs_r = first + tl.arange(0, BLOCK_M), pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_m, mask_r = positions < end, offs_r < rank
        at = rows_at(rows, positions, mask_m)
        left_rows = left + at[:, None] * stride_lm  # [BLOCK_M, 1]
        if stride_dk is None:
            step = rank
        else:
            step = stride_dk
        down_cols = (
            factor_at(down, table, g, stride_dg, ALIGNED) + offs_r.to(tl.int64)[None, :] * stride_dr
        )  # [1, BLOCK_R]
        if seed_ptr is not None:
            seed, threshold = tl.load(seed_ptr), tl.load(thresholds + g)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(0, tl.where(pid_r * BLOCK_R < rank, K, 0), BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            left_tile = tl.load(left_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            down_ptrs = down_cols + offs_k.to(tl.int64)[:, None] * step  # [BLOCK_K, BLOCK_R]
            down_tile = tl.load(down_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            if seed_ptr is not None:
                keep = keep_rows(seed, at.to(tl.int32), k, threshold, BLOCK_M, BLOCK_K)
                left_tile = tl.where(keep, left_tile, tl.zeros_like(left_tile))
            acc = tl.dot(left_tile, down_tile.to(left_tile.dtype), acc, input_precision=PRECISION)
        low_ptrs = low + positions.to(tl.int64)[:, None] * R + offs_r[None, :]
        acc *= tl.load(factors + g)
        tl.store(low_ptrs, acc.to(low.dtype.element_ty), mask=mask_m[:, None] & (offs_r < R)[None, :])


def grouped_shrink(
    left: Tensor,
    down: Factors,
    groups: Groups,
    factors: Tensor,
    config: ShrinkConfig,
    *,
    seed: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """factors[g] * drop(left[rows]) @ down_g: low [P, R], in left's dtype.

    Args:
        left: [M, K], row-major.
        down: of left's dtype or fp32.
        factors: fp32 [G].
        seed, thresholds: of left's dropout, int64 [1] and int32 [G]; None where nothing is dropped.
    """
    low = torch.empty((groups.P, groups.R), dtype=left.dtype, device=left.device)
    grid = (groups.items(config.BLOCK_M), cdiv(groups.R, config.BLOCK_R))
    tensors = (left, down.first, down.table, low, groups.offsets, groups.rows, groups.ranks, factors, seed, thresholds)
    strides = (left.stride(0), down.stride_g, down.stride_rank, down.stride_wide)
    choices = {"ALIGNED": down.aligned, "PRECISION": precision(left.dtype)} | groups.constexprs | config.constexprs
    launch(grouped_shrink_kernel, grid, (*tensors, groups.P, groups.G, left.shape[1], *strides), choices)
    return low
