"""wgrad: the gradients of the thin matrices, a thin matrix transposed times a wide one, summed over all M rows.

    dA [R, K] = dh [M, R]t @ drop(x) [M, K]
    dB [N, R] = (h [M, R]t @ dy [M, N])t      the same kernel, stored through its strides

In the kernel's words: out [R, C] = factor * low [M, R]t @ drop(left) [M, C], its columns times column_scale [C] where
one is given (out_scale and grad_row_scale for dB). Tile BLOCK_R x BLOCK_C; M is cut into
splits that fill the card. One split stores the result; several store fp32 partial sums [splits, R * C], which
sum_slabs_kernel adds in a fixed order: no atomics, so the same bits in every run. left and low in one dtype (bf16,
fp16, fp32), fp32 accumulation, out in the adapter's dtype. Any M, C, R.
The masked operand is the right one of the product, which Hopper reads from shared memory: see shrink.py on left
operands in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import WgradConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.dropout import NO_DROPOUT, Dropout, keep_tile
from fused_lora.triton_kernels.launch import launch

SUM_TILE = {"BLOCK": 512, "TOGETHER": 8}


@triton.jit
def wgrad_kernel(
    low,  # [M, R], contiguous
    left,  # [M, C], row stride stride_lm
    out,  # element (r, c) at r * stride_or + c * stride_oc; or fp32 slabs of it [splits, R * C]
    seed_ptr,  # int64 [1], or None
    column_scale,  # [C], or None
    M,
    C,
    rows_per_split,
    stride_lm,
    stride_or,
    stride_oc,
    factor,
    threshold,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_c, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    if DROPOUT:
        seed = tl.load(seed_ptr)
    end = min(M, (split + 1) * rows_per_split)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(split * rows_per_split, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        left_ptrs = left + offs_m.to(tl.int64)[:, None] * stride_lm + offs_c[None, :]  # [BLOCK_M, BLOCK_C]
        low_ptrs = low + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]  # [BLOCK_M, BLOCK_R]
        left_tile = tl.load(left_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        low_tile = tl.load(low_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            keep = keep_tile(seed, m, pid_c * BLOCK_C, threshold, BLOCK_M, BLOCK_C)
            left_tile = tl.where(keep, left_tile, tl.zeros_like(left_tile))
        acc = tl.dot(low_tile.T, left_tile, acc, input_precision=PRECISION)
    if column_scale is not None:
        acc *= tl.load(column_scale + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    out_rows = out + split.to(tl.int64) * R * C + offs_r.to(tl.int64)[:, None] * stride_or  # [BLOCK_R, 1]
    out_ptrs = out_rows + offs_c.to(tl.int64)[None, :] * stride_oc
    tl.store(out_ptrs, (acc * factor).to(out.dtype.element_ty), mask=mask_r[:, None] & mask_c[None, :])


def wgrad(
    low: Tensor,
    left: Tensor,
    dtype: torch.dtype,
    config: WgradConfig,
    *,
    transposed: bool = False,
    dropout: Dropout = NO_DROPOUT,
    column_scale: Tensor | None = None,
) -> Tensor:
    """lowt @ drop(left) * column_scale, summed over the rows: [R, C] in dtype, or [C, R] if transposed.

    Args:
        low: [M, R], contiguous.
        left: [M, C], row-major, in low's dtype.
        dropout: of left.
        column_scale: [C], contiguous, or None.
    """
    (M, C), R = left.shape, low.shape[1]
    shape, strides = ((C, R), (1, R)) if transposed else ((R, C), (C, 1))
    out = torch.empty(shape, dtype=dtype, device=left.device)
    target = slabs_of(out, config.splits)
    grid = (cdiv(C, config.BLOCK_C), cdiv(R, config.BLOCK_R), config.splits)
    tensors = (low, left, target, dropout.seed, column_scale)
    sizes = (M, C, config.rows_per_split, left.stride(0), *strides, dropout.factor, dropout.threshold)
    choices = {"R": R, "DROPOUT": dropout.seed is not None, "PRECISION": precision(left.dtype)}
    launch(wgrad_kernel, grid, tensors + sizes, choices | config.constexprs)
    sum_slabs((target, out, 1.0))
    return out


@triton.jit
def _sum_slabs(slabs, out, size, count, factor, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """out [size] = factor * sum of slabs [count, size]; TOGETHER of them are read at once, as one after another their
    latencies would add up."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, TOGETHER):
        offs_slab = first + tl.arange(0, TOGETHER)
        mask = (offs_slab < count)[:, None] & (offs < size)[None, :]
        acc += tl.sum(tl.load(slabs + offs_slab.to(tl.int64)[:, None] * size + offs[None, :], mask=mask, other=0.0), 0)
    tl.store(out + offs, (acc * factor).to(out.dtype.element_ty), mask=offs < size)


@triton.jit
def sum_slabs_kernel(
    slabs,  # fp32 [count, size]
    out,  # [size]
    more_slabs,  # fp32 [more_count, more_size], or None
    more_out,  # [more_size], or None
    size,
    count,
    factor,
    more_size,
    more_count,
    more_factor,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """out = factor * sum of its slabs, in a fixed order; a second row of programs, if any, does the same for `more`."""
    if tl.program_id(1) == 0:
        _sum_slabs(slabs, out, size, count, factor, BLOCK, TOGETHER)
    elif more_slabs is not None:
        _sum_slabs(more_slabs, more_out, more_size, more_count, more_factor, BLOCK, TOGETHER)


def slabs_of(out: Tensor, count: int) -> Tensor:
    """Where a kernel stores: out itself, or fp32 partial results [count, *out.shape]."""
    return out if count == 1 else torch.empty((count, *out.shape), dtype=torch.float32, device=out.device)


def sum_slabs(*parts: tuple[Tensor, Tensor, float]) -> None:
    """out = factor * sum of its slabs [count, *out.shape], for one or two (slabs, out, factor), in one launch.

    A part whose slabs are out itself is there already: its kernel has stored it with its factor.
    """
    parts = tuple(part for part in parts if part[0] is not part[1])
    if not parts:
        return
    (slabs, out, factor), (more_slabs, more, more_factor) = parts if len(parts) == 2 else (*parts, (None, None, 1.0))
    size, more_size = out.numel(), 0 if more is None else more.numel()
    more_count = 0 if more_slabs is None else len(more_slabs)
    sizes = (size, len(slabs), factor, more_size, more_count, more_factor)
    grid = (cdiv(max(size, more_size), SUM_TILE["BLOCK"]), len(parts))
    launch(sum_slabs_kernel, grid, (slabs, out, more_slabs, more, *sizes), SUM_TILE)
