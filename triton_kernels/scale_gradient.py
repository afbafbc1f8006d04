"""scale_gradient: the gradient of out_scale [N], sum over M of dy * z, from y = out_scale * z + bias.

    dout_scale = sums of dy * (y - bias) / out_scale      low_gradient leaves the sums of its row blocks

But for the columns of which y tells too little: those with sum (y - bias)^2 <= M * max(|bias|, smallest)^2, where the
bias holds most of y's digits, or out_scale is zero. Their z = x Wt + low Bt is computed again, by the tile of BLOCK_N
columns: `columns_kernel` starts a program for every tile and split of the rows, which ends at once where no column of
it is lost, so nothing is read on the host. Three launches in a fixed order: the same bits in every run.
Source: the rule is `ops.reference.out_scale_gradient`'s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.launch import launch

SUMS_TILE = {"BLOCK": 32, "TOGETHER": 64}
COLUMNS_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_R": 16, "num_stages": 3, "num_warps": 4}
ROWS_PER_SPLIT = 256


@triton.jit
def sums_kernel(
    sums,  # fp32 [count, 2, N]
    out_scale,  # [N]
    bias,  # [N], or None
    grad,  # fp32 [N]
    lost,  # int32 [N]
    N,
    count,
    M,
    smallest,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """grad = sum of the products / out_scale, and which columns need their z."""
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    products = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, TOGETHER):
        offs = first + tl.arange(0, TOGETHER)
        mask = (offs < count)[:, None] & mask_n[None, :]
        ptrs = sums + offs.to(tl.int64)[:, None] * 2 * N + offs_n[None, :]
        products += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 0)
        squares += tl.sum(tl.load(ptrs + N, mask=mask, other=0.0), 0)
    least = tl.zeros((BLOCK,), tl.float32) + smallest
    if bias is not None:
        least = tl.maximum(least, tl.abs(tl.load(bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)))
    tl.store(lost + offs_n, (squares <= least * least * M).to(tl.int32), mask=mask_n)
    scale = tl.load(out_scale + offs_n, mask=mask_n, other=1.0).to(tl.float32)
    tl.store(grad + offs_n, products / tl.where(scale == 0.0, 1.0, scale), mask=mask_n)


@triton.jit
def columns_kernel(
    dy,  # [M, N], row stride stride_dm
    x,  # [M, K], row stride stride_xm
    weight,  # [N, K], row stride stride_wn
    low,  # [M, R], contiguous
    lora_B,  # element (n, r) at n * stride_bn + r * stride_br
    lost,  # int32 [N]
    slabs,  # fp32 [splits, N]
    M,
    N,
    K,
    rows_per_split,
    stride_dm,
    stride_xm,
    stride_wn,
    stride_bn,
    stride_br,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """slabs = sum over the split's rows of dy * z, in the tiles that hold a lost column."""
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, cols = offs_n < N, offs_n.to(tl.int64)[None, :]
    if tl.max(tl.load(lost + offs_n, mask=mask_n, other=0), 0) > 0:
        end = min(M, (split + 1) * rows_per_split)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for m in range(split * rows_per_split, end, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            mask_m, rows = offs_m < end, offs_m.to(tl.int64)[:, None]
            z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, K, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_k = offs_k < K
                x_ptrs, W_ptrs = x + rows * stride_xm + offs_k[None, :], weight + cols * stride_wn + offs_k[:, None]
                x_tile = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
                W_tile = tl.load(W_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
                z = tl.dot(x_tile, W_tile, z, input_precision=PRECISION)
            for r in range(0, R, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R)
                low_tile = tl.load(
                    low + rows * R + offs_r[None, :], mask=mask_m[:, None] & (offs_r < R)[None, :], other=0.0
                )
                B_ptrs = lora_B + cols * stride_bn + offs_r[:, None] * stride_br
                B_tile = tl.load(B_ptrs, mask=(offs_r < R)[:, None] & mask_n[None, :], other=0.0)
                z = tl.dot(low_tile, B_tile.to(low_tile.dtype), z, input_precision=PRECISION)
            dy_ptrs = dy + rows * stride_dm + offs_n[None, :]
            total += tl.sum(z * tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32), 0)
        tl.store(slabs + split.to(tl.int64) * N + offs_n, total, mask=mask_n)


@triton.jit
def select_kernel(grad, lost, slabs, out, N, count, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """out [N] = the sum of the slabs [count, N] where the column is lost, grad elsewhere."""
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    chosen = tl.load(lost + offs_n, mask=mask_n, other=0) > 0
    total = tl.where(chosen, 0.0, tl.load(grad + offs_n, mask=mask_n, other=0.0))
    if tl.max(chosen.to(tl.int32), 0) > 0:
        for first in range(0, count, TOGETHER):
            offs = first + tl.arange(0, TOGETHER)
            ptrs = slabs + offs.to(tl.int64)[:, None] * N + offs_n[None, :]
            total += tl.sum(tl.load(ptrs, mask=(offs < count)[:, None] & chosen[None, :], other=0.0), 0)
    tl.store(out + offs_n, total.to(out.dtype.element_ty), mask=mask_n)


def scale_gradient(
    sums: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    lora_B: Tensor,
    out_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The gradient of out_scale: [N], in its dtype.

    Args:
        sums: [row blocks, 2, N] of low_gradient.
        dy, x, weight: [M, N], [M, K] and [N, K], row-major, in one dtype.
        low: [M, R], contiguous, what y's update was computed from.
        lora_B: [N, R], with any strides; dy's dtype or fp32.
        out_scale, bias: [N], contiguous; bias may be None.
    """
    (M, N), K, R = dy.shape, x.shape[1], low.shape[1]
    grad, out = torch.empty(N, dtype=torch.float32, device=dy.device), torch.empty_like(out_scale)
    lost = torch.empty(N, dtype=torch.int32, device=dy.device)
    blocks = (cdiv(N, SUMS_TILE["BLOCK"]),)
    smallest = 2 * torch.finfo(dy.dtype).tiny
    launch(sums_kernel, blocks, (sums, out_scale, bias, grad, lost, N, len(sums), M, smallest), SUMS_TILE)
    splits = cdiv(M, ROWS_PER_SPLIT)
    slabs = torch.empty((splits, N), dtype=torch.float32, device=dy.device)
    strides = (dy.stride(0), x.stride(0), weight.stride(0), *lora_B.stride())
    args = (dy, x, weight, low, lora_B, lost, slabs, M, N, K, ROWS_PER_SPLIT, *strides)
    choices = {"R": R, "PRECISION": precision(dy.dtype)}
    launch(columns_kernel, (cdiv(N, COLUMNS_TILE["BLOCK_N"]), splits), args, choices | COLUMNS_TILE)
    launch(select_kernel, blocks, (grad, lost, slabs, out, N, splits), SUMS_TILE)
    return out
