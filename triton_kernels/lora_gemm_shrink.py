"""lora_gemm_shrink: lora_gemm that makes its own low, so left is read once and the two are one launch.

    h  = scaling * x  @ A [R, K]t,   y  = x  @ W [N, K]t + h  @ B [N, R]t + bias       forward
    dh = scaling * dy @ B [N, R],    dx = dy @ W [N, K]  + dh @ A [R, K]               backward

In the kernel's words: low = factor * left down, out = left right + low thin + bias; down is stored as right is, [R, K]
(RIGHT_NK) or [K, R]. The tiles of out's first column also accumulate low from the left tiles they stage anyway, store
it and raise a flag for their rows; the other tiles wait for it before the update. `state` is int32 [1 + row blocks],
zeroed before each launch in stream order: the next tile's number, flags.
Progress, with any number of programs resident: numbers are drawn from the counter, the first column's first, and a tile
waits only for a lower number of the first column, which a running program drew and which itself never waits. Numbers
are drawn a tile ahead, to hide the latency of it; that changes nothing, since a program that holds a first-column
number in reserve is itself at work on one. low is stored and loaded by ordinary instructions, ordered by barrier,
release and acquire; TMA would need a proxy fence.
Tile, dtypes, numerics as lora_gemm, R up to BLOCK_R, down in left's dtype, TMA only. No dropout: a masked left operand
would pass through registers into a pipelined wgmma (shrink.py). On an H100, Triton 3.6, 8192 x 4096 x 4096, bf16, R =
16, a probe of this form took 396 us, shrink and lora_gemm 35 + 383 us (2026-11-23); this kernel itself is level with
the two or slower (H200, 2026-11-26), and configs.py plans it only on request.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.triton_kernels.configs import GemmConfig, cdiv
from fused_lora.triton_kernels.device import precision, tma_ready
from fused_lora.triton_kernels.launch import launch
from fused_lora.triton_kernels.lora_gemm import arrived, described, low_at, position, right_at, store_at, thin_at


@triton.jit
def lora_gemm_shrink_kernel(
    left,  # descriptor of [M, K]
    right,  # descriptor of [N, K] or [K, N]
    down,  # descriptor of [R, K] or [K, R]
    thin,  # element (r, n) at r * stride_tr + n * stride_tn
    bias,  # [N], or None
    out,  # descriptor of [M, N]
    low,  # [M, R], contiguous
    state,  # int32 [1 + row blocks], zeros
    M,
    N,
    K,
    stride_tn,
    stride_tr,
    factor,
    R: tl.constexpr,
    RIGHT_NK: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = low.dtype.element_ty
    tile = tl.atomic_add(state, 1, sem="relaxed")
    while tile < tiles_m * tiles_n:
        next_tile = tl.atomic_add(state, 1, sem="relaxed")
        if tile < tiles_m:
            pid_m, pid_n = tile, 0
        else:
            pid_m, pid_n = position(tile - tiles_m, tiles_m, tiles_n - 1, GROUP_M)
            pid_n += 1
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m, offs_n, offs_r = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        if PREFETCH:
            thin_tile = thin_at(thin, 0, offs_n, N, stride_tn, stride_tr, R, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        flag = state + 1 + pid_m
        if tile < tiles_m:
            low_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in range(0, K, BLOCK_K):
                left_tile = left.load([m, k])
                right_tile = right_at(right, n, k, N, K, 0, RIGHT_NK, BLOCK_N, BLOCK_K, True)
                down_tile = right_at(down, 0, k, R, K, 0, RIGHT_NK, BLOCK_R, BLOCK_K, True)
                acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
                low_acc = tl.dot(left_tile, down_tile, low_acc, input_precision=PRECISION)
            low_ptrs = low + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
            tl.store(low_ptrs, (low_acc * factor).to(dtype), mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
            tl.debug_barrier()  # the release below is one thread's: first the stores of all of them
            tl.atomic_xchg(flag, 1, sem="release")
        else:
            for k in range(0, K, BLOCK_K):
                left_tile = left.load([m, k])
                right_tile = right_at(right, n, k, N, K, 0, RIGHT_NK, BLOCK_N, BLOCK_K, True)
                acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
            while tl.atomic_add(flag, 0, sem="acquire") == 0:
                pass
        if not PREFETCH:
            thin_tile = thin_at(thin, 0, offs_n, N, stride_tn, stride_tr, R, BLOCK_R)
        low_tile = low_at(low, offs_m, 0, M, R, BLOCK_R)
        acc = tl.dot(low_tile, arrived(thin_tile, offs_r, offs_n, R, N, dtype), acc, input_precision=PRECISION)
        store_at(out, acc, None, bias, m, n, offs_m, offs_n, M, N, BIAS, True)
        tile = next_tile


def lora_gemm_shrink(
    left: Tensor,
    right: Tensor,
    down: Tensor,
    thin: Tensor,
    bias: Tensor | None,
    factor: float,
    config: GemmConfig,
    *,
    right_nk: bool,
) -> tuple[Tensor, Tensor]:
    """low = factor * left @ down, [M, R], and out = left @ right + low @ thin + bias, [M, N], both in left's dtype.

    Args:
        left: [M, K], row-major.
        right: [N, K] if right_nk, else [K, N], row-major, in left's dtype.
        down: [R, K] if right_nk, else [K, R], row-major; left's dtype or fp32, of which a copy in left's is made.
        thin: [N, R] if right_nk, else [R, N], with any strides; left's dtype or fp32.
        bias: [N], contiguous, or None.
        config: with a BLOCK_R of at least R.
    Returns: (out, low).
    Raises: ValueError if a matrix lies in memory as no descriptor can have it, or the rank block is smaller.
    """
    (M, K), (N, R) = left.shape, (right.shape[0], down.shape[0]) if right_nk else (right.shape[1], down.shape[1])
    if R > config.BLOCK_R:
        raise ValueError(f"config must have a BLOCK_R of at least R = {R}; got {config.BLOCK_R}")
    stride_tn, stride_tr = thin.stride() if right_nk else thin.stride()[::-1]
    out = torch.empty((M, N), dtype=left.dtype, device=left.device)
    low = torch.empty((M, R), dtype=left.dtype, device=left.device)
    down = down.to(left.dtype)  # TMA brings a tile as it is
    for name, t in (("left", left), ("right", right), ("down", down), ("out", out)):
        if not tma_ready(t):
            raise ValueError(f"{name} must have rows that start on 16 bytes; got strides {t.stride()} of {t.dtype}")
    left_tiles, right_tiles, out_tiles = described(config, right_nk, left, right, out)
    down_block = [config.BLOCK_R, config.BLOCK_K] if right_nk else [config.BLOCK_K, config.BLOCK_R]
    down_tiles = TensorDescriptor.from_tensor(down, down_block)
    # Of this launch alone: launches on other streams, and a graph's replays, must find no flag raised.
    state = torch.zeros(1 + cdiv(M, config.BLOCK_M), dtype=torch.int32, device=left.device)
    tensors = (left_tiles, right_tiles, down_tiles, thin, bias, out_tiles, low, state)
    sizes = (M, N, K, stride_tn, stride_tr, factor)
    choices = {"R": R, "RIGHT_NK": right_nk, "BIAS": bias is not None, "PRECISION": precision(left.dtype)}
    launch(lora_gemm_shrink_kernel, (config.programs,), tensors + sizes, choices | config.constexprs)
    return out, low
