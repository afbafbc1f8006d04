"""Triton back end, on every GPU that Triton serves; also in Triton's interpreter.

    forward    shrink (h), lora_gemm (y), or both in one launch (lora_gemm_shrink)
    backward   dy_pass (dh and dB), or shrink (dh) and wgrad (dB); lora_gemm (dx); wgrad (dA); lora_gemm_shrink (dh and
               dx) where dB is not needed. What splits dy or x over its rows or columns adds a launch that sums fp32
               slabs.

Which form serves a call is a choice of triton_kernels/configs.py.
"""

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.backends import FUSED_DTYPES, Request, only_plain
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.reference import Gradients
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.dy_pass import dy_pass_kernel
from fused_lora.triton_kernels.launch import launch
from fused_lora.triton_kernels.lora_gemm import lora_gemm_kernel
from fused_lora.triton_kernels.lora_gemm_shrink import lora_gemm_shrink_kernel
from fused_lora.triton_kernels.shrink import shrink_kernel
from fused_lora.triton_kernels.wgrad import sum_slabs_kernel, wgrad_kernel

_SUM_BLOCK = 512
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
    """Launches go to the current device: make it the tensors' own. torch.accelerator is a context manager that does
    nothing at index None."""
    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)


def _precision(dtype: torch.dtype) -> str:
    """How fp32 products are computed: tf32 only where PyTorch's own matmul may."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t with neighbouring columns adjacent in memory and rows apart; any row stride is fine as it is."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _tma_ready(t: torch.Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0


def _shrink(x, thin, stride_tr, stride_tk, R, factor, dropout_p, seed, c=None):
    """factor * drop(x) [M, K] @ thin, thin [R, K] given by its strides, in x's dtype."""
    M, K = x.shape
    h = torch.empty((M, R), dtype=x.dtype, device=x.device)
    c = c or configs.shrink_config(M, K, R, x.element_size(), _device(x.device))
    threshold = dropout_threshold(dropout_p) if seed is not None else 0
    launch(
        shrink_kernel,
        (triton.cdiv(M, c.BLOCK_M), triton.cdiv(R, c.BLOCK_R)),
        x,
        thin,
        h,
        seed,
        M,
        K,
        x.stride(0),
        stride_tr,
        stride_tk,
        factor * 65536 / (65536 - threshold),
        threshold,
        R=R,
        BLOCK_M=c.BLOCK_M,
        BLOCK_R=c.BLOCK_R,
        BLOCK_K=c.BLOCK_WIDE,
        DROPOUT=seed is not None,
        PRECISION=_precision(x.dtype),
        num_stages=c.num_stages,
        num_warps=c.num_warps,
    )
    return h


def _described(c, right_nk, left, right, out, rank=None):
    """Descriptors of the tensors with the blocks that a GEMM loads and stores."""
    wide, thin = (
        ([c.BLOCK_N, c.BLOCK_K], [c.BLOCK_R, c.BLOCK_K])
        if right_nk
        else ([c.BLOCK_K, c.BLOCK_N], [c.BLOCK_K, c.BLOCK_R])
    )
    pairs = ((left, [c.BLOCK_M, c.BLOCK_K]), (right, wide), (out, [c.BLOCK_M, c.BLOCK_N]), (rank, thin))
    return [TensorDescriptor.from_tensor(t, block) for t, block in pairs if t is not None]


def _lora_gemm(left, right, right_nk, low, thin, stride_tn, stride_tr, bias, dropout_p, seed, c=None):
    """left [M, K] @ right + keep * (low [M, R] @ thin) + bias; right is [N, K] if right_nk, else [K, N]."""
    (M, K), R = left.shape, low.shape[1]
    N = right.shape[0] if right_nk else right.shape[1]
    out = torch.empty((M, N), dtype=left.dtype, device=left.device)
    device = _device(left.device)
    c = c or configs.gemm_config(M, N, K, R, left.element_size(), seed is not None, device)
    threshold = dropout_threshold(dropout_p) if seed is not None else 0
    tma = device.tma and _tma_ready(left) and _tma_ready(right) and _tma_ready(out)
    tiles = _described(c, right_nk, left, right, out) if tma else (left, right, out)
    launch(
        lora_gemm_kernel,
        (c.programs,),
        tiles[0],
        tiles[1],
        low,
        thin,
        bias,
        tiles[2],
        seed,
        M,
        N,
        K,
        left.stride(0),
        right.stride(0),
        stride_tn,
        stride_tr,
        65536 / (65536 - threshold),
        threshold,
        R=R,
        RIGHT_NK=right_nk,
        BIAS=bias is not None,
        DROPOUT=seed is not None,
        TMA=tma,
        PRECISION=_precision(left.dtype),
        BLOCK_M=c.BLOCK_M,
        BLOCK_N=c.BLOCK_N,
        BLOCK_K=c.BLOCK_K,
        BLOCK_R=c.BLOCK_R,
        GROUP_M=c.GROUP_M,
        PREFETCH=c.PREFETCH,
        num_stages=c.num_stages,
        num_warps=c.num_warps,
    )
    return out


def _one_launch(left, right, rank, N, R):
    """Where `_lora_gemm_shrink` serves these operands and pays: its config and rank in left's dtype, else None."""
    c = configs.gemm_shrink_config(left.shape[0], N, left.shape[1], R, left.element_size(), _device(left.device))
    if c is None or not (_tma_ready(left) and _tma_ready(right) and N * left.element_size() % 16 == 0):
        return None
    rank = rank.to(left.dtype)  # a copy of R rows or columns where the adapters are fp32: TMA brings a tile as it is
    return (c, rank) if _tma_ready(rank) else None


def _lora_gemm_shrink(left, right, right_nk, thin, stride_tn, stride_tr, bias, factor, c, rank):
    """low = factor * left [M, K] @ rank and left @ right + low @ thin + bias in one launch; rank is [R, K] if right_nk,
    else [K, R]."""
    (M, K), R = left.shape, rank.shape[0 if right_nk else 1]
    N = right.shape[0 if right_nk else 1]
    out = torch.empty((M, N), dtype=left.dtype, device=left.device)
    low = torch.empty((M, R), dtype=left.dtype, device=left.device)
    state = torch.zeros(
        1 + triton.cdiv(M, c.BLOCK_M), dtype=torch.int32, device=left.device
    )  # of this launch alone: streams, graphs
    left_tiles, right_tiles, out_tiles, rank_tiles = _described(c, right_nk, left, right, out, rank)
    launch(
        lora_gemm_shrink_kernel,
        (c.programs,),
        left_tiles,
        right_tiles,
        rank_tiles,
        thin,
        bias,
        out_tiles,
        low,
        state,
        M,
        N,
        K,
        left.stride(0),
        right.stride(0),
        rank.stride(0),
        stride_tn,
        stride_tr,
        factor,
        R=R,
        RIGHT_NK=right_nk,
        BIAS=bias is not None,
        TMA=True,
        PRECISION=_precision(left.dtype),
        BLOCK_M=c.BLOCK_M,
        BLOCK_N=c.BLOCK_N,
        BLOCK_K=c.BLOCK_K,
        BLOCK_R=c.BLOCK_R,
        GROUP_M=c.GROUP_M,
        PREFETCH=c.PREFETCH,
        num_stages=c.num_stages,
        num_warps=c.num_warps,
    )
    return out, low


def _wgrad(thin, wide, out, stride_or, stride_oc, dropout_p, seed, c=None):
    """out = thin [M, R]t @ drop(wide) [M, C], element (r, c) at r * stride_or + c * stride_oc."""
    (M, C), R = wide.shape, thin.shape[1]
    c = c or configs.wgrad_config(M, C, R, wide.element_size(), _device(wide.device))
    threshold = dropout_threshold(dropout_p) if seed is not None else 0
    target = _slabs(c.splits, out)
    launch(
        wgrad_kernel,
        (triton.cdiv(C, c.BLOCK_WIDE), triton.cdiv(R, c.BLOCK_R), c.splits),
        thin,
        wide,
        target,
        seed,
        M,
        C,
        c.rows_per_split,
        wide.stride(0),
        stride_or,
        stride_oc,
        65536 / (65536 - threshold),
        threshold,
        R=R,
        BLOCK_M=c.BLOCK_M,
        BLOCK_R=c.BLOCK_R,
        BLOCK_C=c.BLOCK_WIDE,
        DROPOUT=seed is not None,
        PRECISION=_precision(wide.dtype),
        num_stages=c.num_stages,
        num_warps=c.num_warps,
    )
    _sum_slabs([(target, out, 1.0)])
    return out


def _dy_pass(dy, lora_B, h, scaling, c: configs.ThinConfig):
    """dh = scaling * dy @ B in dy's dtype and dB = dyt @ h in B's, from one read of dy."""
    (M, N), R = dy.shape, h.shape[1]
    dh = torch.empty((M, R), dtype=dy.dtype, device=dy.device)
    dB = torch.empty((N, R), dtype=lora_B.dtype, device=dy.device)
    blocks = triton.cdiv(N, c.BLOCK_WIDE)
    dh_target, dB_target = _slabs(blocks, dh), _slabs(c.splits, dB)
    launch(
        dy_pass_kernel,
        (blocks, c.splits),
        dy,
        lora_B,
        h,
        dh_target,
        dB_target,
        M,
        N,
        c.rows_per_split,
        dy.stride(0),
        lora_B.stride(0),
        lora_B.stride(1),
        scaling if dh_target is dh else 1.0,
        R=R,
        BLOCK_M=c.BLOCK_M,
        BLOCK_C=c.BLOCK_WIDE,
        BLOCK_R=c.BLOCK_R,
        PRECISION=_precision(dy.dtype),
        num_stages=c.num_stages,
        num_warps=c.num_warps,
    )
    _sum_slabs([(dh_target, dh, scaling), (dB_target, dB, 1.0)])
    return dh, dB


def _slabs(count, out):
    """Where a kernel stores: out itself, or fp32 partial results [count, *out.shape]."""
    return out if count == 1 else torch.empty((count, *out.shape), dtype=torch.float32, device=out.device)


def _sum_slabs(parts):
    """out = factor * sum of its slabs for each (slabs, out, factor) whose slabs are not out itself: one launch, at most
    two parts."""
    parts = [part for part in parts if part[0] is not part[1]]
    if parts:
        (slabs, out, factor), (more_slabs, more, more_factor) = (
            parts[0],
            parts[1] if len(parts) > 1 else (None, None, 1.0),
        )
        blocks = triton.cdiv(max(part[1].numel() for part in parts), _SUM_BLOCK)
        launch(
            sum_slabs_kernel,
            (blocks, len(parts)),
            slabs,
            out,
            more_slabs,
            more,
            out.numel(),
            len(slabs),
            factor,
            more.numel() if parts[1:] else 0,
            len(more_slabs) if parts[1:] else 0,
            more_factor,
            BLOCK=_SUM_BLOCK,
            TOGETHER=8,
        )


def refusal(request: Request) -> str | None:
    """See `backends`."""
    interpreting = triton.knobs.runtime.interpret
    if request.device.type not in ("cuda", "xpu") and not (interpreting and request.device.type == "cpu"):
        return f"GPU tensors (or CPU tensors with TRITON_INTERPRET=1 in the environment); got {request.device}"
    if request.dtype not in FUSED_DTYPES:
        return f"bfloat16, float16 and float32; got {request.dtype}"
    return only_plain(request)


def summary(request: Request) -> str:
    """See `backends`."""
    return "Triton kernels; the compiled CUDA kernels run on request with backend='cuda' until they are measured"


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    x, weight, lora_A, lora_B = _rows(x), _rows(weight), _rows(lora_A), _rows(lora_B)
    M, N, R = x.shape[0], weight.shape[0], lora_A.shape[0]
    if M == 0:
        return x.new_empty((0, N)), x.new_empty((0, R))
    bias = None if bias is None else bias.contiguous()
    with _on(x.device):
        one_launch = _one_launch(x, weight, lora_A, N, R) if seed is None else None
        if one_launch is not None:
            return _lora_gemm_shrink(x, weight, True, lora_B, lora_B.stride(0), 1, bias, scaling, *one_launch)
        h = _shrink(x, lora_A, lora_A.stride(0), 1, R, scaling, dropout_p, seed)
        return _lora_gemm(x, weight, True, h, lora_B, lora_B.stride(0), 1, bias, 0.0, None), h


def _dh_dB(dy, lora_B, h, scaling, need_dh, need_B):
    """dh and dB as needed, from one read of dy where that pays; h is read for dB only, else None."""
    (M, N), R = dy.shape, lora_B.shape[1]
    h = h.contiguous() if need_B else None
    c = configs.dy_pass_config(M, N, R, dy.element_size(), _device(dy.device)) if need_dh and need_B else None
    if c is not None:
        return _dy_pass(dy, lora_B, h, scaling, c)
    dh = _shrink(dy, lora_B, 1, lora_B.stride(0), R, scaling, 0.0, None) if need_dh else None
    dB = _wgrad(h, dy, torch.empty((N, R), dtype=lora_B.dtype, device=dy.device), 1, R, 0.0, None) if need_B else None
    return dh, dB


def backward(dy, dh, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, variant):
    """The gradients that `needs` asks for, but for the weight's; see `reference.backward`."""
    need_x, need_A, need_B, need_bias = needs.x, needs.lora_A, needs.lora_B, needs.bias
    dy, weight, lora_A, lora_B = _rows(dy), _rows(weight), _rows(lora_A), _rows(lora_B)
    (M, N), (R, K) = dy.shape, lora_A.shape
    if M == 0:
        return Gradients(
            dy.new_empty((0, K)) if need_x else None,
            None,
            lora_A.new_zeros((R, K)) if need_A else None,
            lora_B.new_zeros((N, R)) if need_B else None,
            dy.new_zeros((N,)) if need_bias else None,
        )
    dx = dA = dh = dB = None
    with _on(dy.device):
        one_launch = _one_launch(dy, weight, lora_B, K, R) if need_x and not need_B and seed is None else None
        if one_launch is not None:
            dx, dh = _lora_gemm_shrink(dy, weight, False, lora_A, 1, lora_A.stride(0), None, scaling, *one_launch)
        else:
            dh, dB = _dh_dB(dy, lora_B, h, scaling, need_x or need_A, need_B)
        if need_x and dx is None:
            dx = _lora_gemm(dy, weight, False, dh, lora_A, 1, lora_A.stride(0), None, dropout_p, seed)
        if need_A:
            dA = _wgrad(dh, _rows(x), torch.empty((R, K), dtype=lora_A.dtype, device=dy.device), K, 1, dropout_p, seed)
        return Gradients(dx, None, dA, dB, dy.sum(0) if need_bias else None)
