"""Triton back end: two launches forward, four to six backward, on every GPU that Triton serves; also in Triton's interpreter.

    forward    shrink (h), lora_gemm (y)
    backward   shrink (dh), lora_gemm (dx), wgrad (dA), wgrad (dB), each with one more launch where it is split over the rows
"""

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.reference import dropout_threshold
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.lora_gemm import lora_gemm_kernel
from fused_lora.triton_kernels.shrink import shrink_kernel
from fused_lora.triton_kernels.wgrad import sum_splits_kernel, wgrad_kernel

_SUM_BLOCK = 1024
# The interpreter runs programs one after another: few of them, and both ways of splitting within reach of small tests.
_INTERPRETER = configs.Device(tma=False, sms=4, shared_bytes=64 * 1024)


@functools.cache
def _device(device: torch.device) -> configs.Device:
    """Properties of a GPU as the choices need them."""
    if device.type == "cpu":
        return _INTERPRETER
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    target = triton.runtime.driver.active.get_current_target()
    tma = target.backend == "cuda" and target.arch >= 90
    return configs.Device(tma, properties["multiprocessor_count"], properties["max_shared_mem"])


def _on(device: torch.device):
    """Launches go to the current device: make it the tensors' own. torch.accelerator is a context manager that does nothing at index None."""
    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)


def _precision(dtype: torch.dtype) -> str:
    """How fp32 products are computed: tf32 only where PyTorch's own matmul may."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t with neighbouring columns adjacent in memory and rows apart; any row stride is fine as it is."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _tma_ready(t: torch.Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0


def _shrink(x, thin, stride_tr, stride_tk, R, factor, dropout_p, seed):
    """factor * drop(x) [M, K] @ thin, thin [R, K] given by its strides, in x's dtype."""
    M, K = x.shape
    h = torch.empty((M, R), dtype=x.dtype, device=x.device)
    c = configs.shrink_config(M, K, R, x.element_size(), _device(x.device))
    threshold = dropout_threshold(dropout_p) if seed is not None else 0
    shrink_kernel[(triton.cdiv(M, c.BLOCK_M), triton.cdiv(R, c.BLOCK_R))](
        x, thin, h, seed, M, K, x.stride(0), stride_tr, stride_tk, factor * 65536 / (65536 - threshold), threshold,
        R=R, BLOCK_M=c.BLOCK_M, BLOCK_R=c.BLOCK_R, BLOCK_K=c.BLOCK_WIDE, DROPOUT=seed is not None, PRECISION=_precision(x.dtype),
        num_stages=c.num_stages, num_warps=c.num_warps,
    )  # fmt: skip
    return h


def _lora_gemm(left, right, right_nk, low, thin, stride_tn, stride_tr, bias, dropout_p, seed):
    """left [M, K] @ right + keep * (low [M, R] @ thin) + bias; right is [N, K] if right_nk, else [K, N]."""
    (M, K), R = left.shape, low.shape[1]
    N = right.shape[0] if right_nk else right.shape[1]
    out = torch.empty((M, N), dtype=left.dtype, device=left.device)
    device = _device(left.device)
    c = configs.gemm_config(M, N, K, R, left.element_size(), seed is not None, device)
    threshold = dropout_threshold(dropout_p) if seed is not None else 0
    tma = device.tma and _tma_ready(left) and _tma_ready(right) and _tma_ready(out)
    tiles = (left, right, out)
    if tma:
        blocks = ([c.BLOCK_M, c.BLOCK_K], [c.BLOCK_N, c.BLOCK_K] if right_nk else [c.BLOCK_K, c.BLOCK_N], [c.BLOCK_M, c.BLOCK_N])
        tiles = [TensorDescriptor.from_tensor(t, block) for t, block in zip(tiles, blocks)]
    lora_gemm_kernel[(c.programs,)](
        tiles[0], tiles[1], low, thin, bias, tiles[2], seed, M, N, K, left.stride(0), right.stride(0), stride_tn, stride_tr,
        65536 / (65536 - threshold), threshold, R=R, RIGHT_NK=right_nk, BIAS=bias is not None, DROPOUT=seed is not None, TMA=tma,
        PRECISION=_precision(left.dtype), BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=c.BLOCK_R, GROUP_M=c.GROUP_M,
        num_stages=c.num_stages, num_warps=c.num_warps,
    )  # fmt: skip
    return out


def _wgrad(thin, wide, out, stride_or, stride_oc, dropout_p, seed):
    """out = thin [M, R]t @ drop(wide) [M, C], element (r, c) at r * stride_or + c * stride_oc."""
    (M, C), R = wide.shape, thin.shape[1]
    c = configs.wgrad_config(M, C, R, wide.element_size(), _device(wide.device))
    threshold = dropout_threshold(dropout_p) if seed is not None else 0
    target = out if c.splits == 1 else torch.empty((c.splits, *out.shape), dtype=torch.float32, device=out.device)
    wgrad_kernel[(triton.cdiv(C, c.BLOCK_WIDE), triton.cdiv(R, c.BLOCK_R), c.splits)](
        thin, wide, target, seed, M, C, c.rows_per_split, wide.stride(0), stride_or, stride_oc, 65536 / (65536 - threshold), threshold,
        R=R, BLOCK_M=c.BLOCK_M, BLOCK_R=c.BLOCK_R, BLOCK_C=c.BLOCK_WIDE, DROPOUT=seed is not None, PRECISION=_precision(wide.dtype),
        num_stages=c.num_stages, num_warps=c.num_warps,
    )  # fmt: skip
    if target is not out:
        sum_splits_kernel[(triton.cdiv(out.numel(), _SUM_BLOCK),)](target, out, out.numel(), c.splits, BLOCK=_SUM_BLOCK)
    return out


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    x, weight, lora_A, lora_B = _rows(x), _rows(weight), _rows(lora_A), _rows(lora_B)
    M, N, R = x.shape[0], weight.shape[0], lora_A.shape[0]
    if M == 0:
        return x.new_empty((0, N)), x.new_empty((0, R))
    bias = None if bias is None else bias.contiguous()
    with _on(x.device):
        h = _shrink(x, lora_A, lora_A.stride(0), 1, R, scaling, dropout_p, seed)
        return _lora_gemm(x, weight, True, h, lora_B, lora_B.stride(0), 1, bias, 0.0, None), h


def backward(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """[dx, dA, dB, dbias], None where `needs` says so; see `reference.backward`."""
    need_x, need_A, need_B, need_bias = needs
    dy, weight, lora_A, lora_B = _rows(dy), _rows(weight), _rows(lora_A), _rows(lora_B)
    (M, N), (R, K) = dy.shape, lora_A.shape
    if M == 0:
        zeros = (dy.new_empty((0, K)), lora_A.new_zeros((R, K)), lora_B.new_zeros((N, R)), dy.new_zeros((N,)))
        return [zero if need else None for zero, need in zip(zeros, needs)]
    dx = dA = dB = None
    with _on(dy.device):
        if need_x or need_A:
            dh = _shrink(dy, lora_B, 1, lora_B.stride(0), R, scaling, 0.0, None)
        if need_x:
            dx = _lora_gemm(dy, weight, False, dh, lora_A, 1, lora_A.stride(0), None, dropout_p, seed)
        if need_A:
            dA = _wgrad(dh, _rows(x), torch.empty((R, K), dtype=lora_A.dtype, device=dy.device), K, 1, dropout_p, seed)
        if need_B:
            dB = _wgrad(h.contiguous(), dy, torch.empty((N, R), dtype=lora_B.dtype, device=dy.device), 1, R, 0.0, None)
        return [dx, dA, dB, dy.sum(0) if need_bias else None]
