"""CUDA back end: the compiled kernels for NVIDIA GPUs of compute capability 9.0, bf16 and fp16.

One call into C++ per direction, on x's device and the caller's current stream, without a synchronisation. Beside the
outputs a call allocates one workspace, of the size that csrc/cuda/heuristics.h plans. y, h and dx repeat bit for bit;
dA and dB do under torch.use_deterministic_algorithms(True).
"""

import functools
import itertools

import torch

from fused_lora import _C
from fused_lora.backends import Request, only_plain, read_plan
from fused_lora.ops import internals
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.internals import current_device, current_stream
from fused_lora.ops.reference import Gradients

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_RANK = _C.cuda_max_rank
_FIELDS = 1 + max(field for _, field, _ in _C.cuda_plan_words)


@functools.cache
def _built() -> bool:
    return _C.build_info()["cuda"]


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _request(sizes, dtypes) -> dict[str, int]:
    return dict(zip(("M", "N", "K", "R", "dtype", "adapter_dtype"), (*sizes, *dtypes)))


@functools.lru_cache(4096)
def _forward_bytes(sizes, dtypes, dropout, sms, plan) -> int:
    return _C.cuda_forward_plan(**_request(sizes, dtypes), dropout=dropout, sms=sms, plan=plan)["bytes"]


@functools.lru_cache(4096)
def _backward_bytes(sizes, dtypes, dropout, needs, deterministic, sms, plan) -> int:
    needed = dict(zip(("need_x", "need_A", "need_B", "need_bias"), needs))
    request = _request(sizes, dtypes) | needed
    return _C.cuda_backward_plan(**request, dropout=dropout, deterministic=deterministic, sms=sms, plan=plan)["bytes"]


@functools.cache
def _values(plan: str) -> tuple[int, ...]:
    """A plan as the compiled code takes it: a number for each field, 0 where the plan says nothing of it."""
    said = read_plan(plan, _C.cuda_plan_words)
    return tuple(said.get(field, 0) for field in range(_FIELDS))


@functools.cache
def _architectures() -> tuple[str, ...]:
    """What this build holds machine code for, such as 90a."""
    return tuple(_C.build_info()["cuda_archs"].replace(",", ";").split(";"))


def refusal(request: Request) -> str | None:
    """See `backends`."""
    if not _built():
        return (
            "GPU tensors in a build with CUDA kernels; this one has none (install where nvcc is found, or with "
            "FUSED_LORA_CUDA=1)"
        )
    if request.device.type != "cuda":
        return f"GPU tensors; got {request.device}"
    if _capability(request.device.index) != (9, 0):
        major, minor = _capability(request.device.index)
        return f"GPUs of compute capability 9.0 (H100, H200); got {major}.{minor}"
    if "90a" not in _architectures():
        return f"GPUs of compute capability 9.0 in a build for 90a; this one is for {', '.join(_architectures())}"
    if request.dtype not in _DTYPES:
        return f"bfloat16 and float16; got {request.dtype}"
    if request.N % 8 or request.K % 8:
        return f"sizes N and K that are multiples of 8; got N = {request.N}, K = {request.K}"
    if request.R > _MAX_RANK:
        return f"ranks up to {_MAX_RANK}; got {request.R}"
    if not request.aligned:
        return "a weight with contiguous rows that start on 16 bytes; got one with others"
    return only_plain(request)


def _joined(words) -> str:
    return "+".join(filter(None, words))


def plans(request: Request) -> tuple[str, ...]:
    """See `backends`: the heuristics' own plan; each way to make h with each way to make dh, dA and dB; one by one, the
    other width of tiles, or tiles instead of the kernel for few rows; kernels that don't overlap; the masked h by
    the loader's idle warps; and with that and without, h and dh by one column of tiles where two would make them."""
    sizes, code = (max(request.M, 1), request.N, request.K, request.R), _CODE[request.dtype]
    call = _request(sizes, (code, code)) | dict(dropout=False, sms=_sms(request.device.index))
    needs = dict(need_x=True, need_A=True, need_B=True, need_bias=False, deterministic=False)
    done = _C.cuda_forward_plan(**call)["plan"] + "+" + _C.cuda_backward_plan(**call, **needs)["plan"]

    def others(*words: str) -> list[str]:
        return [word for word in words if word not in done.split("+")]

    parts = itertools.product(["", *others("h_shrink")], ["", *others("wgrad_apart", "dh_shrink")])
    alone = others("y128", "y256")[:1] + others("dx128", "dx256", "serial")
    warps = ["h_warps"] if request.R <= 32 else []
    singles = [word.replace("halves", "single") for word in done.split("+") if word.endswith("_halves")]
    return *map(_joined, parts), *alone, *warps, *(_joined([plan, *singles]) for plan in ("", *warps) if singles)


def check_plan(request: Request, plan: str) -> None:
    """See `backends`: any words, one of each field at the most, the heuristics choose the rest."""
    conflict = _C.cuda_plan_conflict(M=request.M, R=request.R, plan=_values(plan))
    if conflict is not None:
        raise ValueError(f"{conflict}; got {plan!r}")


def summary(request: Request, plan: str) -> str:
    """See `backends`."""
    return f"compiled CUDA kernels, {plan}" if plan else "compiled CUDA kernels"


def _padded(R: int) -> int:
    return (R + 7) // 8 * 8


def _target(index: int) -> tuple[int, int]:
    """A device, and its stream that is current."""
    return index, current_stream(index)


def _empty(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return internals.empty_on_cuda((rows, cols), (cols, 1), dtype)


def _workspace(nbytes: int) -> torch.Tensor:
    return internals.empty_on_cuda(((nbytes + 3) // 4,), (1,), torch.float32)


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    index = x.device.index
    if current_device() != index:
        with torch.cuda.device(index):
            return forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan)
    (M, K), (N, R), dtype = x.shape, lora_B.shape, x.dtype
    y, h = _empty(M, N, dtype), _empty(M, _padded(R), dtype)
    if M == 0:
        return y, h[:, :R].contiguous()
    sizes, dtypes = (M, N, K, R), (_CODE[dtype], _CODE[lora_A.dtype])
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    values = _values(plan)
    nbytes = _forward_bytes(sizes, dtypes, dropout[1] > 0, _sms(index), values)
    workspace = _workspace(nbytes)  # a name, so that it lives until the launches are on the stream
    _C.cuda_forward(
        x=x,
        W=weight,
        A=lora_A,
        B=lora_B,
        bias=bias,
        h=h,
        y=y,
        workspace=(workspace.data_ptr(), nbytes),
        scaling=scaling,
        dropout=dropout,
        plan=values,
        target=_target(index),
    )
    return y, h if h.shape[1] == R else h[:, :R].contiguous()


def backward(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan):
    """The gradients that `needs` asks for, but for the weight's; see `reference.backward`."""
    index = dy.device.index
    if current_device() != index:
        given = dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed
        with torch.cuda.device(index):
            return backward(*given, needs, variant, plan)
    (M, N), (R, K), dtype, adapter = dy.shape, lora_A.shape, dy.dtype, lora_A.dtype
    needed = need_x, need_A, need_B, need_bias = needs.x, needs.lora_A, needs.lora_B, needs.bias
    dx = _empty(M, K, dtype) if need_x else None
    dA = _empty(R, K, adapter) if need_A else None
    dB = _empty(N, R, adapter) if need_B else None
    dbias = internals.empty_on_cuda((N,), (1,), dtype) if need_bias else None
    grads = dx, dA, dB, dbias
    if M == 0 or not any(needed):
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return Gradients(dx, None, dA, dB, dbias)
    if need_B and R % 8:
        h = torch.nn.functional.pad(h, (0, _padded(R) - R))
    sizes, dtypes = (M, N, K, R), (_CODE[dtype], _CODE[adapter])
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    deterministic = torch.are_deterministic_algorithms_enabled()
    values = _values(plan)
    nbytes = _backward_bytes(sizes, dtypes, dropout[1] > 0, needed, deterministic, _sms(index), values)
    workspace = _workspace(nbytes)
    _C.cuda_backward(
        dy=dy,
        x=x if need_A else None,
        W=weight if need_x else None,
        A=lora_A,
        B=lora_B,
        h=h if need_B else None,
        grads=grads,
        workspace=(workspace.data_ptr(), nbytes),
        scaling=scaling,
        dropout=dropout,
        deterministic=deterministic,
        plan=values,
        target=_target(index),
    )
    return Gradients(dx, None, dA, dB, dbias)
