"""dy_pass: dh and dB from one read of dy, for a backward that needs both.

    dh [M, R] = factor * dy [M, N] @ B [N, R]
    dB [N, R] = (h [M, R]t @ dy [M, N])t

A program owns a block of BLOCK_C columns and a split of the rows. It loads its B tile once and walks down its rows in
steps of BLOCK_M; each dy tile [BLOCK_M, BLOCK_C] serves both products from shared memory: its part of dh, stored at
once, and dB's accumulator, stored at the end. Several column blocks leave fp32 slabs of dh [blocks, M, R], several
splits fp32 slabs of dB [splits, N, R]; sum_slabs_kernel (wgrad.py) adds both in one launch in a fixed order: no
atomics, the same bits in every run. One block, or one split, stores the result itself. Slabs are written once and read
once: 8 R (1 / BLOCK_C + 1 / rows of a split) bytes for an element of dy, 3/8 of its own two in bf16 at R = 16 with 256
columns and 512 rows, most of it in L2. Shared memory: num_stages - 1 tiles of dy, and the B tile.
dy and h in one dtype (bf16, fp16, fp32), B in the same or fp32 (rounded to dy's on the way), fp32 accumulation, dB in
the adapter's dtype. Any M and N; R up to BLOCK_R. dy is the right operand of dB: with it on the left (dy_tile.T) the
copies are pipelined on Hopper only. No operand that wgmma reads is masked or cast in registers inside the loop: see
shrink.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import WgradConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.launch import launch
from fused_lora.triton_kernels.wgrad import slabs_of, sum_slabs


@triton.jit
def dy_pass_kernel(
    dy,  # [M, N], row stride stride_dm
    lora_B,  # element (n, r) at n * stride_bn + r * stride_br
    h,  # [M, R], contiguous
    dh,  # [M, R], contiguous; or fp32 slabs of it [blocks, M, R]
    dB,  # [N, R], contiguous; or fp32 slabs of it [splits, N, R]
    M,
    N,
    rows_per_split,
    stride_dm,
    stride_bn,
    stride_br,
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
    B_ptrs = lora_B + offs_c.to(tl.int64)[:, None] * stride_bn + offs_r[None, :] * stride_br
    B_tile = tl.load(B_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_C, BLOCK_R]
    B_tile = B_tile.to(dy.dtype.element_ty)
    end = min(M, (split + 1) * rows_per_split)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(split * rows_per_split, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        offs_mr = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        dy_ptrs = dy + offs_m.to(tl.int64)[:, None] * stride_dm + offs_c[None, :]
        dy_tile = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        h_tile = tl.load(h + offs_mr, mask=mask_mr, other=0.0)  # [BLOCK_M, BLOCK_R]
        dh_tile = tl.dot(dy_tile, B_tile, input_precision=PRECISION)
        acc = tl.dot(h_tile.T, dy_tile, acc, input_precision=PRECISION)
        tl.store(dh + pid_c.to(tl.int64) * M * R + offs_mr, (dh_tile * factor).to(dh.dtype.element_ty), mask=mask_mr)
    dB_ptrs = dB + split.to(tl.int64) * N * R + offs_c.to(tl.int64)[None, :] * R + offs_r[:, None]
    tl.store(dB_ptrs, acc.to(dB.dtype.element_ty), mask=mask_r[:, None] & mask_c[None, :])


def dy_pass(dy: Tensor, lora_B: Tensor, h: Tensor, factor: float, config: WgradConfig) -> tuple[Tensor, Tensor]:
    """dh = factor * dy @ B, [M, R] in dy's dtype, and dB = dyt @ h, [N, R] in B's.

    Args:
        dy: [M, N], row-major.
        lora_B: [N, R], with any strides; dy's dtype or fp32.
        h: [M, R], contiguous, in dy's dtype.
        config: with a BLOCK_R of at least R.
    Raises: ValueError if the rank block is smaller.
    """
    (M, N), R = dy.shape, h.shape[1]
    if R > config.BLOCK_R:
        raise ValueError(f"config must have a BLOCK_R of at least R = {R}; got {config.BLOCK_R}")
    dh = torch.empty((M, R), dtype=dy.dtype, device=dy.device)
    dB = torch.empty((N, R), dtype=lora_B.dtype, device=dy.device)
    blocks = cdiv(N, config.BLOCK_C)
    dh_target, dB_target = slabs_of(dh, blocks), slabs_of(dB, config.splits)
    tensors = (dy, lora_B, h, dh_target, dB_target)
    sizes = (M, N, config.rows_per_split, dy.stride(0), *lora_B.stride(), factor if dh_target is dh else 1.0)
    choices = {"R": R, "PRECISION": precision(dy.dtype)}
    launch(dy_pass_kernel, (blocks, config.splits), tensors + sizes, choices | config.constexprs)
    sum_slabs((dh_target, dh, factor), (dB_target, dB, 1.0))
    return dh, dB
