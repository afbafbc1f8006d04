"""dy_pass: dh and dB from one read of dy, for a backward that needs both.

    dh [M, R] = factor * dy [M, N] @ B [N, R]
    dB [N, R] = (h [M, R]t @ dy [M, N])t

A program owns a block of BLOCK_C columns and a split of the rows. It loads its B tile once and walks down its rows in
steps of BLOCK_M; each dy tile [BLOCK_M, BLOCK_C] serves both products from shared memory: its part of dh, stored at
once, and dB's accumulator, stored at the end. Several column blocks leave fp32 slabs of dh [blocks, M, R], several
splits fp32 slabs of dB [splits, N, R]; sum_slabs_kernel (wgrad.py) adds
both in one launch in a fixed order: no atomics, the same bits in every run. One block, or one split, stores the result
    itself. Slabs are written
once and read once: 8 R (1 / BLOCK_C + 1 / rows of a split) bytes for an element of dy, 3/8 of its own two in bf16 at R
    = 16 with 256 columns
and 512 rows, most of it in L2. Shared memory: num_stages - 1 tiles of dy, and the B tile.
dy and h in one dtype (bf16, fp16, fp32), B in the same or fp32 (rounded to dy's on the way), fp32 accumulation, dB in
the adapter's dtype. Any M and N; R up to BLOCK_R. dy is the right operand of dB: with it on the left (dy_tile.T) the
copies are pipelined on Hopper only.
No operand that wgmma reads is masked or cast in registers inside the loop: see shrink.py.
"""

import triton
import triton.language as tl


@triton.jit
def dy_pass_kernel(
    dy,
    thin,
    h,
    dh,
    dB,
    M,
    N,
    rows_per_split,
    stride_dm,
    stride_tn,
    stride_tr,
    factor,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_c, split = tl.program_id(0), tl.program_id(1)
    offs_c, offs_r = pid_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < N, offs_r < R
    thin_ptrs = thin + offs_c.to(tl.int64)[:, None] * stride_tn + offs_r[None, :] * stride_tr
    thin_tile = tl.load(thin_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0).to(
        dy.dtype.element_ty
    )  # [BLOCK_C, BLOCK_R]
    end = min(M, (split + 1) * rows_per_split)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(split * rows_per_split, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        rows_r = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        dy_ptrs = dy + offs_m.to(tl.int64)[:, None] * stride_dm + offs_c[None, :]
        dy_tile = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        h_tile = tl.load(h + rows_r, mask=mask_mr, other=0.0)  # [BLOCK_M, BLOCK_R]
        dh_tile = tl.dot(dy_tile, thin_tile, input_precision=PRECISION)
        acc = tl.dot(h_tile.T, dy_tile, acc, input_precision=PRECISION)
        tl.store(dh + pid_c.to(tl.int64) * M * R + rows_r, (dh_tile * factor).to(dh.dtype.element_ty), mask=mask_mr)
    dB_ptrs = dB + split.to(tl.int64) * N * R + offs_c.to(tl.int64)[None, :] * R + offs_r[:, None]
    tl.store(dB_ptrs, acc.to(dB.dtype.element_ty), mask=mask_r[:, None] & mask_c[None, :])
