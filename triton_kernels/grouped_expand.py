"""grouped_expand: expand with a factor of its own for each group of rows.

    y [M, N], row rows[p] of group g: base + h[p] @ B_gt              forward
    dx [M, K], row rows[p] of group g: keep * (dh[p] @ A_g)           backward: the same kernel

Rows that no group has are left alone. Tile BLOCK_M positions of one group x BLOCK_N, one program each (see grouped.py),
along the group's own rank. base may be out itself. low in bf16, fp16 or fp32, the factors in the same dtype or fp32,
fp32 accumulation, one rounding at the store.
"""

import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import ExpandConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.dropout import keep_rows
from fused_lora.triton_kernels.grouped import Factors, Groups, factor_at, item_of, rank_of, rows_at
from fused_lora.triton_kernels.launch import launch


@triton.jit
def grouped_expand_kernel(
    low,  # [P, R], contiguous, zeros beyond a group's rank
    thin,  # element (r, n) of group g at g * stride_tg + r * stride_tr + n * stride_tn
    table,  # int64 [G], addresses instead of g * stride_tg, or None
    base,  # [M, N], row stride stride_bm, or None
    out,  # [M, N], contiguous
    offsets,  # int [G + 1]
    rows,  # int [P], or None
    ranks,  # int32 [G], in multiples of UNIT, or None
    seed_ptr,  # int64 [1], or None
    thresholds,  # int32 [G], or None
    keep_factors,  # fp32 [G], or None
    P,
    G,
    N,
    stride_tg,
    stride_tr,
    stride_tn,  # None: the group's rank
    stride_bm,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1) * BLOCK_N
    g, _, end, first = item_of(offsets, tl.program_id(0), P, G, BLOCK_M, BLOCK_G)
    if first < end:
        rank = rank_of(ranks, g, R, UNIT)
        positions, offs_n = first + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        mask_m, mask_n = positions < end, offs_n < N
        at = rows_at(rows, positions, mask_m)
        low_rows = low + positions.to(tl.int64)[:, None] * R
        if stride_tn is None:
            step = rank
        else:
            step = stride_tn
        thin_cols = factor_at(thin, table, g, stride_tg, ALIGNED) + offs_n.to(tl.int64)[None, :] * step
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in range(0, rank, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            low_mask = mask_m[:, None] & (offs_r < R)[None, :]  # beyond the rank are zeros
            low_tile = tl.load(low_rows + offs_r[None, :], mask=low_mask, other=0.0)
            thin_ptrs = thin_cols + offs_r.to(tl.int64)[:, None] * stride_tr  # [BLOCK_R, BLOCK_N]
            thin_tile = tl.load(thin_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(low_tile, thin_tile.to(low_tile.dtype), acc, input_precision=PRECISION)
        if seed_ptr is not None:
            keep = keep_rows(tl.load(seed_ptr), at.to(tl.int32), n, tl.load(thresholds + g), BLOCK_M, BLOCK_N)
            acc = tl.where(keep, acc * tl.load(keep_factors + g), 0.0)
        mask = mask_m[:, None] & mask_n[None, :]
        if base is not None:
            acc += tl.load(base + at[:, None] * stride_bm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at[:, None] * N + offs_n[None, :], acc.to(out.dtype.element_ty), mask=mask)


def grouped_expand(
    low: Tensor,
    thin: Factors,
    base: Tensor | None,
    out: Tensor,
    groups: Groups,
    config: ExpandConfig,
    *,
    seed: Tensor | None = None,
    thresholds: Tensor | None = None,
    keep_factors: Tensor | None = None,
) -> Tensor:
    """out[rows] = base[rows] + keep * (low @ thin_g); returns out.

    Args:
        low: [P, R], contiguous, zeros beyond a group's rank.
        thin: of low's dtype or fp32.
        base: [M, N], row-major, out itself, or None for zeros.
        out: [M, N], contiguous.
        seed, thresholds, keep_factors: of the product's dropout, int64 [1], int32 [G] and fp32 [G]; None where nothing
            is dropped.
    """
    N = out.shape[1]
    grid = (groups.items(config.BLOCK_M), cdiv(N, config.BLOCK_N))
    of_groups = (groups.offsets, groups.rows, groups.ranks, seed, thresholds, keep_factors)
    strides = (thin.stride_g, thin.stride_rank, thin.stride_wide, 0 if base is None else base.stride(0))
    args = (low, thin.first, thin.table, base, out, *of_groups, groups.P, groups.G, N, *strides)
    choices = {"ALIGNED": thin.aligned, "PRECISION": precision(low.dtype)} | groups.constexprs | config.constexprs
    launch(grouped_expand_kernel, grid, args, choices)
    return out
