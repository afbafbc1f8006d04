"""grouped_wgrad: wgrad for a factor of its own for each group of rows.

    dA_g [R_g, K] = dh_segt @ drop(x[rows_seg])
    dB_g [N, R_g] = (h_segt @ dy[rows_seg])t           the same kernel, stored transposed

In the kernel's words: out_g [R_g, C] = factors[g] * low_segt @ drop(left[rows_seg]); an empty group gets zeros. A work
item (see grouped.py) is up to rows_per_split positions of one group, so that a long group fills the card as many short
ones do. A group of one item stores its result; one of several stores fp32 slabs, which `sum_groups_kernel` adds in a
fixed order: no atomics, the same bits in every run. With T = rows_per_split, item t >= 1 of the group that starts at
position p has slab p // T + t, and item 0 slab P // T + 1 + p // T: no two of them meet, and 2 (P // T + 1) slabs serve
any grouping. Tile BLOCK_R x BLOCK_C; dtypes as wgrad's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import WgradConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.dropout import keep_rows
from fused_lora.triton_kernels.grouped import Groups, item_of, rank_of, rows_at
from fused_lora.triton_kernels.launch import launch

SUM_TILE = {"BLOCK": 512, "TOGETHER": 8}


@triton.jit
def out_start(starts, g, C, R: tl.constexpr):
    """The first element of a group's result."""
    if starts is None:
        at = g.to(tl.int64) * R * C
    else:
        at = tl.load(starts + g)
    return at


@triton.jit
def grouped_wgrad_kernel(
    low,  # [P, R], contiguous
    left,  # [M, C], row stride stride_lm
    out,  # of group g from element starts[g]: [R_g, C], or [C, R_g] if TRANSPOSED
    slabs,  # fp32 [slabs, R * C], each laid out as out, or None
    starts,  # int64 [G], or None for g * R * C
    offsets,  # int [G + 1], or None
    rows,  # int [P], or None
    ranks,  # int32 [G], in multiples of UNIT, or None
    factors,  # fp32 [G], or None
    seed_ptr,  # int64 [1], or None
    thresholds,  # int32 [G], or None
    P,
    G,
    C,
    stride_lm,
    R: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item, pid_c, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, start, end, first = item_of(offsets, item, P, G, ROWS, BLOCK_G)
    rank = rank_of(ranks, g, R, UNIT)
    if ((first < end) | (first == start)) & (pid_r * BLOCK_R < rank):
        offs_c, offs_r = pid_c * BLOCK_C + tl.arange(0, BLOCK_C), pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_c, mask_r = offs_c < C, offs_r < rank
        if seed_ptr is not None:
            seed, threshold = tl.load(seed_ptr), tl.load(thresholds + g)
        stop = min(end, first + ROWS)
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for m in range(first, stop, BLOCK_M):
            positions = m + tl.arange(0, BLOCK_M)
            mask_m = positions < stop
            at = rows_at(rows, positions, mask_m)
            left_ptrs = left + at[:, None] * stride_lm + offs_c[None, :]  # [BLOCK_M, BLOCK_C]
            low_ptrs = low + positions.to(tl.int64)[:, None] * R + offs_r[None, :]  # [BLOCK_M, BLOCK_R]
            left_tile = tl.load(left_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            low_tile = tl.load(low_ptrs, mask=mask_m[:, None] & (offs_r < R)[None, :], other=0.0)
            if seed_ptr is not None:
                keep = keep_rows(seed, at.to(tl.int32), pid_c * BLOCK_C, threshold, BLOCK_M, BLOCK_C)
                left_tile = tl.where(keep, left_tile, tl.zeros_like(left_tile))
            acc = tl.dot(low_tile.T, left_tile, acc, input_precision=PRECISION)
        if factors is not None:
            acc *= tl.load(factors + g)
        if TRANSPOSED:
            within = offs_c.to(tl.int64)[None, :] * rank + offs_r[:, None]
        else:
            within = offs_r.to(tl.int64)[:, None] * C + offs_c[None, :]
        mask = mask_r[:, None] & mask_c[None, :]
        if end - start <= ROWS:
            tl.store(out + out_start(starts, g, C, R) + within, acc.to(out.dtype.element_ty), mask=mask)
        elif slabs is not None:
            slab = start // ROWS + tl.where(first == start, P // ROWS + 1, (first - start) // ROWS)
            tl.store(slabs + slab.to(tl.int64) * R * C + within, acc, mask=mask)


@triton.jit
def sum_groups_kernel(
    slabs,  # fp32 [slabs, R * C]
    out,  # of group g from element starts[g]: R_g * C elements
    starts,  # int64 [G], or None for g * R * C
    offsets,  # int [G + 1], or None
    ranks,  # int32 [G], in multiples of UNIT, or None
    P,
    G,
    C,
    R: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The sum of a group's slabs, for the group of several items that starts in positions j * ROWS to (j + 1) * ROWS,
    of which there is at most one; j is the program's second index."""
    j = tl.program_id(1)
    if offsets is None:
        g, start, end, found = j * 0, j * 0, P, j == 0
    else:
        offs_g = tl.arange(0, BLOCK_G)
        firsts = tl.load(offsets + offs_g, mask=offs_g < G, other=0).to(tl.int32)
        lasts = tl.load(offsets + offs_g + 1, mask=offs_g < G, other=0).to(tl.int32)
        is_it = ((firsts // ROWS == j) & (lasts - firsts > ROWS)).to(tl.int32)
        g, found = tl.sum(is_it * offs_g, 0), tl.sum(is_it, 0) > 0
        start, end = tl.load(offsets + g).to(tl.int32), tl.load(offsets + g + 1).to(tl.int32)
    size = rank_of(ranks, g, R, UNIT) * C
    if found & (tl.program_id(0) * BLOCK < size):
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        count = tl.cdiv(end - start, ROWS)
        acc = tl.zeros((BLOCK,), tl.float32)
        for t in range(0, count, TOGETHER):
            items = t + tl.arange(0, TOGETHER)
            slab = start // ROWS + tl.where(items == 0, P // ROWS + 1, items)
            ptrs = slabs + slab.to(tl.int64)[:, None] * R * C + offs[None, :]
            acc += tl.sum(tl.load(ptrs, mask=(items < count)[:, None] & (offs < size)[None, :], other=0.0), 0)
        tl.store(out + out_start(starts, g, C, R) + offs, acc.to(out.dtype.element_ty), mask=offs < size)


def grouped_wgrad(
    low: Tensor,
    left: Tensor,
    out: Tensor,
    starts: Tensor | None,
    groups: Groups,
    config: WgradConfig,
    *,
    transposed: bool = False,
    seed: Tensor | None = None,
    thresholds: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """For every group out_g = factors[g] * lowt @ drop(left[rows]), [R_g, C], or [C, R_g] if transposed.

    Args:
        low: [P, R], contiguous.
        left: [M, C], row-major, in low's dtype.
        out: where the results go, all groups' together.
        starts: int64 [G], the first element of each group's result; None where they are a stack of one rank.
        seed, thresholds, factors: of left's dropout, int64 [1], int32 [G] and fp32 [G]; None where nothing is dropped.
    """
    C, T = left.shape[1], config.rows_per_split
    several, size = groups.P > T, groups.R * C
    count = 2 * (groups.P // T + 1)
    slabs = torch.empty((count, size), dtype=torch.float32, device=left.device) if several else None
    grid = (groups.items(T), cdiv(C, config.BLOCK_C), cdiv(groups.R, config.BLOCK_R))
    tensors = (low, left, out, slabs, starts, groups.offsets, groups.rows, groups.ranks, factors, seed, thresholds)
    sizes = (groups.P, groups.G, C)
    shared = groups.constexprs | {"ROWS": T}
    choices = shared | {"TRANSPOSED": transposed, "PRECISION": precision(left.dtype)} | config.constexprs
    launch(grouped_wgrad_kernel, grid, (*tensors, *sizes, left.stride(0)), choices)
    if several:
        args = (slabs, out, starts, groups.offsets, groups.ranks, *sizes)
        launch(sum_groups_kernel, (cdiv(size, SUM_TILE["BLOCK"]), groups.P // T + 1), args, shared | SUM_TILE)
