"""wgrad: the gradients of the thin matrices, a thin matrix transposed times a wide one, summed over all M rows.

    dA [R, K] = dh [M, R]t @ drop(x) [M, K]
    dB [N, R] = (h [M, R]t @ dy [M, N])t      the same kernel, stored through its strides

In the kernel's words: out [R, C] = factor * thin [M, R]t @ drop(wide) [M, C]. Tile BLOCK_R x BLOCK_C; M is cut into
splits that fill the card. One split stores the result; several store fp32 partial sums [splits, R * C], which
sum_slabs_kernel adds in a fixed order: no atomics, so the same bits in every run. wide and thin in one dtype (bf16,
    fp16, fp32), fp32 accumulation, out in the adapter's dtype. Any M, C, R.
The masked operand is the right one, which Hopper reads from shared memory: see shrink.py on left operands in registers.
"""

import triton
import triton.language as tl
from fused_lora.triton_kernels.dropout import keep_tile


@triton.jit
def wgrad_kernel(
    thin,
    wide,
    out,
    seed_ptr,
    M,
    C,
    rows_per_split,
    stride_wm,
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
        wide_ptrs = wide + offs_m.to(tl.int64)[:, None] * stride_wm + offs_c[None, :]
        thin_ptrs = thin + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        wide_tile = tl.load(wide_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        thin_tile = tl.load(thin_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            wide_tile = tl.where(
                keep_tile(seed, m, pid_c * BLOCK_C, threshold, BLOCK_M, BLOCK_C), wide_tile, tl.zeros_like(wide_tile)
            )
        acc = tl.dot(thin_tile.T, wide_tile, acc, input_precision=PRECISION)
    out_ptrs = (
        out
        + split.to(tl.int64) * R * C
        + offs_r.to(tl.int64)[:, None] * stride_or
        + offs_c.to(tl.int64)[None, :] * stride_oc
    )
    tl.store(out_ptrs, (acc * factor).to(out.dtype.element_ty), mask=mask_r[:, None] & mask_c[None, :])


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
    slabs,
    out,
    more_slabs,
    more_out,
    size,
    count,
    factor,
    more_size,
    more_count,
    more_factor,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """out = factor * sum of the fp32 slabs [count, size], in a fixed order; a second row of programs, if any, does the
    same for `more`."""
    if tl.program_id(1) == 0:
        _sum_slabs(slabs, out, size, count, factor, BLOCK, TOGETHER)
    elif more_slabs is not None:
        _sum_slabs(more_slabs, more_out, more_size, more_count, more_factor, BLOCK, TOGETHER)
