"""shrink: a wide matrix times a thin one, low = factor * drop(left) @ down.

    h  [M, R] = factor * drop(x) [M, K] @ A [R, K]t      forward
    dh [M, R] = factor * dy [M, N] @ B [N, R]            backward: the same kernel, B read through its strides

With h_in or gate it also writes what the update reads instead, gated = (low + in_factor * h_in) * gate: M R elements
more here, where lora_gemm would read all three once for every column of tiles. low_gradient.py is its backward.
Tile BLOCK_M x BLOCK_R, one program each, along the whole of K. Any M, K, R: every access is masked. left in bf16, fp16
or fp32, down in the same dtype or fp32 (rounded to left's dtype on the way), fp32 accumulation, one rounding at the
store.
BLOCK_M stays below 64: Hopper then uses mma.sync. A wgmma with its masked left operand in registers is what ptxas
before 13.3 can corrupt inside a pipelined loop; the kernel is bound by memory anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import ShrinkConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.dropout import NO_DROPOUT, Dropout, keep_tile
from fused_lora.triton_kernels.launch import launch


@triton.jit
def gate_at(gate, offs_m, offs_r, mask, R: tl.constexpr, GATES: tl.constexpr):
    """The tile of gate [M, GATES] in fp32, each gate for R / GATES neighbouring ranks."""
    columns = offs_r // (R // GATES)
    return tl.load(gate + offs_m.to(tl.int64)[:, None] * GATES + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def shrink_kernel(
    left,  # [M, K], row stride stride_lm
    down,  # element (k, r) at k * stride_dk + r * stride_dr
    low,  # [M, R], contiguous
    seed_ptr,  # int64 [1], or None
    h_in,  # [M, R], contiguous, or None
    gate,  # [M, GATES], contiguous, or None
    gated,  # [M, R], contiguous, or None without h_in and gate
    M,
    K,
    stride_lm,
    stride_dr,
    stride_dk,
    factor,
    threshold,
    in_factor,  # None without h_in
    R: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_m, pid_r = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    left_rows = left + offs_m.to(tl.int64)[:, None] * stride_lm  # [BLOCK_M, 1]
    down_cols = down + offs_r[None, :] * stride_dr  # [1, BLOCK_R]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        left_tile = tl.load(left_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        down_ptrs = down_cols + offs_k.to(tl.int64)[:, None] * stride_dk  # [BLOCK_K, BLOCK_R]
        down_tile = tl.load(down_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            keep = keep_tile(seed, pid_m * BLOCK_M, k, threshold, BLOCK_M, BLOCK_K)
            left_tile = tl.where(keep, left_tile, tl.zeros_like(left_tile))
        acc = tl.dot(left_tile, down_tile.to(left_tile.dtype), acc, input_precision=PRECISION)
    low_ptrs = low + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(low_ptrs, (acc * factor).to(low.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
    if gated is not None:
        acc *= factor
        offs_mr, mask_mr = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :], mask_m[:, None] & mask_r[None, :]
        if h_in is not None:
            acc += in_factor * tl.load(h_in + offs_mr, mask=mask_mr, other=0.0).to(tl.float32)
        if gate is not None:
            acc *= gate_at(gate, offs_m, offs_r, mask_mr, R, GATES)
        tl.store(gated + offs_mr, acc.to(gated.dtype.element_ty), mask=mask_mr)


def shrink(
    left: Tensor, down: Tensor, factor: float, config: ShrinkConfig, *, down_rk: bool, dropout: Dropout = NO_DROPOUT
) -> Tensor:
    """factor * drop(left) @ down: low [M, R], in left's dtype.

    Args:
        left: [M, K], row-major.
        down: [R, K] if down_rk, else [K, R], with any strides; left's dtype or fp32.
        dropout: of left.
    """
    return gated_shrink(left, down, factor, None, None, config, down_rk=down_rk, dropout=dropout)[0]


def gated_shrink(
    left: Tensor,
    down: Tensor,
    factor: float,
    h_in: Tensor | None,
    gate: Tensor | None,
    config: ShrinkConfig,
    *,
    down_rk: bool,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """low = factor * drop(left) @ down, and (low + factor * h_in) * gate, which is low itself without both: [M, R], in
    left's dtype.

    Args:
        h_in: [M, R], contiguous, in left's dtype, or None.
        gate: [M, k], contiguous, k dividing R, in any floating dtype, or None.
        The others as in `shrink`.
    """
    M, K = left.shape
    R, (stride_dr, stride_dk) = (down.shape[0], down.stride()) if down_rk else (down.shape[1], down.stride()[::-1])
    low = torch.empty((M, R), dtype=left.dtype, device=left.device)
    gated = None if h_in is None and gate is None else torch.empty_like(low)
    grid = (cdiv(M, config.BLOCK_M), cdiv(R, config.BLOCK_R))
    tensors = (left, down, low, dropout.seed, h_in, gate, gated)
    sizes = (M, K, left.stride(0), stride_dr, stride_dk, factor * dropout.factor, dropout.threshold)
    in_factor = None if h_in is None else factor
    choices = {"R": R, "GATES": 1 if gate is None else gate.shape[1]}
    choices |= {"DROPOUT": dropout.seed is not None, "PRECISION": precision(left.dtype)}
    launch(shrink_kernel, grid, (*tensors, *sizes, in_factor), choices | config.constexprs)
    return low, low if gated is None else gated
