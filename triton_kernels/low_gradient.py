"""low_gradient: what comes back to the low-rank path where the op has optional tensors, from one read of dy.

    dz    [M, N] = out_scale * dy                               rounded to dy's dtype, as the products take it
    g     [M, R] = dz @ B [N, R],  g_c = dz @ (c * B)           c = grad_row_scale [N]
    dh    [M, R] = factor * (g * gate + dh_out)                 for dx, the gradient of the returned h included
    dh_c  [M, R] = factor * (g_c * gate + dh_out)               for dA
    dh_in [M, R] = factor * g * gate
    dgate [M, R] = g * (h + factor * h_in)                      to be summed over each gate's ranks
    low   [M, R] = (h + factor * h_in) * gate                   for dB
    sums  [row blocks, 2, N] = sums over rows of dy * (y - bias) and (y - bias)^2     for scale_gradient.py

The shrink of the backward with more of an epilogue; each output is written only where it is asked for. Tile BLOCK_M x
BLOCK_R, one program each, along the whole of N. dz goes to memory once, so that lora_gemm, whose loop must not touch
its operands in registers, can stay as it is: 2 bytes written beside 2 read for an element of dy in bf16. Any M, N, R;
bf16, fp16, fp32; B in the same dtype or fp32; fp32 accumulation. As in shrink.py BLOCK_M stays below 64, so the scaled
left operand meets mma.sync.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lora.triton_kernels.configs import ShrinkConfig, cdiv
from fused_lora.triton_kernels.device import precision
from fused_lora.triton_kernels.launch import launch
from fused_lora.triton_kernels.shrink import gate_at


@triton.jit
def low_gradient_kernel(
    dy,  # [M, N], row stride stride_dm
    lora_B,  # element (n, r) at n * stride_bn + r * stride_br
    out_scale,  # [N], or None
    row_scale,  # [N], or None
    y,  # [M, N], row stride stride_ym, or None
    bias,  # [N], or None
    h,  # [M, R], contiguous, or None where neither dgate nor low is wanted
    h_in,  # [M, R], contiguous, or None
    gate,  # [M, GATES], contiguous, or None
    dh_out,  # [M, R], contiguous, or None
    dz,  # [M, N], contiguous, or None
    sums,  # fp32 [row blocks, 2, N], or None
    dh,  # [M, R], contiguous, or None; so are the next four
    dh_c,
    dh_in,
    dgate,
    low,
    M,
    N,
    stride_dm,
    stride_bn,
    stride_br,
    stride_ym,
    factor,
    R: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_m, pid_r = tl.program_id(0), tl.program_id(1)
    offs_m, offs_r = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows = offs_m.to(tl.int64)[:, None]
    once = tl.where(pid_r == 0, N, 0)  # columns of dz and sums that this program writes: the first rank block's, all
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc_c = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n in range(0, N, BLOCK_K):
        offs_n = n + tl.arange(0, BLOCK_K)
        mask_n = offs_n < N
        mask_mn = mask_m[:, None] & mask_n[None, :]
        tile = tl.load(dy + rows * stride_dm + offs_n[None, :], mask=mask_mn, other=0.0)  # [BLOCK_M, BLOCK_K]
        B_ptrs = lora_B + offs_n.to(tl.int64)[:, None] * stride_bn + offs_r[None, :] * stride_br
        B_tile = tl.load(B_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if sums is not None:
            y_tile = tl.load(y + rows * stride_ym + offs_n[None, :], mask=mask_mn, other=0.0).to(tl.float32)
            if bias is not None:
                y_tile -= tl.load(bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
                y_tile = tl.where(mask_mn, y_tile, 0.0)
            sums_ptrs = sums + pid_m.to(tl.int64) * 2 * N + offs_n
            tl.store(sums_ptrs, tl.sum(tile.to(tl.float32) * y_tile, 0), mask=offs_n < once)
            tl.store(sums_ptrs + N, tl.sum(y_tile * y_tile, 0), mask=offs_n < once)
        if out_scale is not None:
            scale = tl.load(out_scale + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            tile = (tile.to(tl.float32) * scale[None, :]).to(tile.dtype)
        if dz is not None:
            tl.store(dz + rows * N + offs_n[None, :], tile, mask=mask_m[:, None] & (offs_n < once)[None, :])
        acc = tl.dot(tile, B_tile.to(tile.dtype), acc, input_precision=PRECISION)
        if row_scale is not None:
            scale_c = tl.load(row_scale + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            B_c = (B_tile.to(tl.float32) * scale_c[:, None]).to(tile.dtype)
            acc_c = tl.dot(tile, B_c, acc_c, input_precision=PRECISION)
    dtype: tl.constexpr = dy.dtype.element_ty
    offs_mr, mask_mr = rows * R + offs_r[None, :], mask_m[:, None] & mask_r[None, :]
    into, into_c = acc, acc_c
    if gate is not None:
        factors = gate_at(gate, offs_m, offs_r, mask_mr, R, GATES)
        into, into_c = acc * factors, acc_c * factors
    if dh_in is not None:
        tl.store(dh_in + offs_mr, (into * factor).to(dtype), mask=mask_mr)
    if dh_out is not None:
        returned = tl.load(dh_out + offs_mr, mask=mask_mr, other=0.0).to(tl.float32)
        into, into_c = into + returned, into_c + returned
    if dh is not None:
        tl.store(dh + offs_mr, (into * factor).to(dtype), mask=mask_mr)
    if dh_c is not None:
        tl.store(dh_c + offs_mr, (into_c * factor).to(dtype), mask=mask_mr)
    if h is not None:
        total = tl.load(h + offs_mr, mask=mask_mr, other=0.0).to(tl.float32)
        if h_in is not None:
            total += factor * tl.load(h_in + offs_mr, mask=mask_mr, other=0.0).to(tl.float32)
        if dgate is not None:
            tl.store(dgate + offs_mr, (acc * total).to(dgate.dtype.element_ty), mask=mask_mr)
        if low is not None:
            if gate is not None:
                total *= factors
            tl.store(low + offs_mr, total.to(dtype), mask=mask_mr)


class LowGradient(NamedTuple):
    """What low_gradient writes; as an argument, whether each is wanted. M R elements in dy's dtype, but for
    three."""

    dz: Tensor | bool | None = None  # [M, N]
    sums: Tensor | bool | None = None  # fp32 [row blocks, 2, N]
    dh: Tensor | bool | None = None
    dh_c: Tensor | bool | None = None
    dh_in: Tensor | bool | None = None
    dgate: Tensor | bool | None = None  # in the gate's dtype with a gate for each rank, else fp32
    low: Tensor | bool | None = None


def low_gradient(
    dy: Tensor,
    lora_B: Tensor,
    out_scale: Tensor | None,
    row_scale: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    h: Tensor | None,
    h_in: Tensor | None,
    gate: Tensor | None,
    dh_out: Tensor | None,
    factor: float,
    wanted: LowGradient,
    config: ShrinkConfig,
) -> LowGradient:
    """The wanted ones of the head's formulas, None for the others.

    Args:
        dy: [M, N], row-major.
        lora_B: [N, R], with any strides; dy's dtype or fp32.
        out_scale, row_scale: [N], contiguous, or None.
        y: [M, N], row-major, in dy's dtype, for the sums.
        bias: [N], contiguous, or None.
        h, h_in, dh_out: [M, R], contiguous, in dy's dtype, or None; h for dgate and low.
        gate: [M, k], contiguous, k dividing R, or None.
    """
    (M, N), R = dy.shape, lora_B.shape[1]
    GATES = 1 if gate is None else gate.shape[1]
    blocks = cdiv(M, config.BLOCK_M)
    shapes = LowGradient((M, N), (blocks, 2, N), *((M, R),) * 5)
    dgate_dtype = gate.dtype if gate is not None and GATES == R else torch.float32
    dtypes = LowGradient(dy.dtype, torch.float32, dy.dtype, dy.dtype, dy.dtype, dgate_dtype, dy.dtype)
    made = LowGradient(
        *(
            torch.empty(shape, dtype=dtype, device=dy.device) if want else None
            for shape, dtype, want in zip(shapes, dtypes, wanted)
        )
    )
    h = h if wanted.dgate or wanted.low else None
    y, bias = (y, bias) if wanted.sums else (None, None)
    row_scale = row_scale if wanted.dh_c else None
    tensors = (dy, lora_B, out_scale, row_scale, y, bias, h, h_in if h is not None else None, gate, dh_out, *made)
    sizes = (M, N, dy.stride(0), *lora_B.stride(), 0 if y is None else y.stride(0), factor)
    choices = {"R": R, "GATES": GATES, "PRECISION": precision(dy.dtype)}
    launch(low_gradient_kernel, (blocks, cdiv(R, config.BLOCK_R)), tensors + sizes, choices | config.constexprs)
    return made
