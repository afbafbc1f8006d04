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
    other width of tiles, or tiles instead of the kernel for few rows; kernels that don't overlap; what the loader's
    idle warps can make; and with those and without, h and dh by one column of tiles where two would make them."""
    sizes, code = (max(request.M, 1), request.N, request.K, request.R), _CODE[request.dtype]
    call = _request(sizes, (code, code)) | dict(dropout=False, sms=_sms(request.device.index))
    needs = dict(need_x=True, need_A=True, need_B=True, need_bias=False, deterministic=False)
    done = _C.cuda_forward_plan(**call)["plan"] + "+" + _C.cuda_backward_plan(**call, **needs)["plan"]

    def others(*words: str) -> list[str]:
        return [word for word in words if word not in done.split("+")]

    parts = itertools.product(["", *others("h_shrink")], ["", *others("wgrad_apart", "dh_shrink")])
    alone = others("y128", "y256")[:1] + others("dx128", "dx256", "serial")
    warps = ["h_warps+wgrad_warps"] if request.R <= 16 else []  # beyond, not with dropout
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


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t with contiguous rows that start on 16 bytes; a wider row stride is fine as it is."""
    if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _flat(t: torch.Tensor) -> torch.Tensor:
    """t contiguous from an address that is a multiple of 16."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _padded(R: int) -> int:
    return (R + 7) // 8 * 8


def _ptr(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _workspace(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty((nbytes + 3) // 4, dtype=torch.float32, device=device)


def _launch(function, on: torch.device, **arguments) -> None:
    """function(**arguments, device, stream) with the device `on` current and its current stream."""
    index = on.index
    if current_device() == index:
        return function(**arguments, device=index, stream=current_stream(index))
    with torch.cuda.device(index):
        function(**arguments, device=index, stream=current_stream(index))


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    (M, K), N, R, dtype, device = x.shape, weight.shape[0], lora_A.shape[0], x.dtype, x.device
    y, h = torch.empty(M, N, dtype=dtype, device=device), torch.empty(M, _padded(R), dtype=dtype, device=device)
    if M == 0:
        return y, h[:, :R].contiguous()
    x, lora_A, lora_B, bias = _rows(x), _flat(lora_A), _flat(lora_B), None if bias is None else _flat(bias)
    sizes, dtypes = (M, N, K, R), (_CODE[dtype], _CODE[lora_A.dtype])
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    values = _values(plan)
    nbytes = _forward_bytes(sizes, dtypes, dropout[1] > 0, _sms(device.index), values)
    workspace = _workspace(nbytes, device)  # a name, so that it lives until the launches are on the stream
    _launch(
        _C.cuda_forward,
        device,
        x=(x.data_ptr(), x.stride(0)),
        W=(weight.data_ptr(), weight.stride(0)),
        A=lora_A.data_ptr(),
        B=lora_B.data_ptr(),
        bias=_ptr(bias),
        h=h.data_ptr(),
        y=y.data_ptr(),
        workspace=(workspace.data_ptr(), nbytes),
        sizes=sizes,
        dtypes=dtypes,
        scaling=scaling,
        dropout=dropout,
        plan=values,
    )
    return y, h if h.shape[1] == R else h[:, :R].contiguous()


def backward(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan):
    """The gradients that `needs` asks for, but for the weight's; see `reference.backward`."""
    (M, N), (R, K), dtype, device = dy.shape, lora_A.shape, dy.dtype, dy.device
    need_x, need_A, need_B, need_bias = needs.x, needs.lora_A, needs.lora_B, needs.bias
    make = torch.empty if M else torch.zeros
    dx = make(M, K, dtype=dtype, device=device) if need_x else None
    dA = make(R, K, dtype=lora_A.dtype, device=device) if need_A else None
    dB = make(N, R, dtype=lora_B.dtype, device=device) if need_B else None
    dbias = make(N, dtype=dtype, device=device) if need_bias else None
    if M == 0 or not (need_x or need_A or need_B or need_bias):
        return Gradients(dx, None, dA, dB, dbias)
    dy, lora_A, lora_B = _rows(dy), _flat(lora_A), _flat(lora_B)
    x = _rows(x) if need_A else None
    if need_B:
        h = _rows(h) if R % 8 == 0 else torch.nn.functional.pad(h, (0, _padded(R) - R))
    sizes, dtypes = (M, N, K, R), (_CODE[dtype], _CODE[lora_A.dtype])
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    deterministic = torch.are_deterministic_algorithms_enabled()
    needs = (need_x, need_A, need_B, need_bias)
    values = _values(plan)
    nbytes = _backward_bytes(sizes, dtypes, dropout[1] > 0, needs, deterministic, _sms(device.index), values)
    workspace = _workspace(nbytes, device)
    _launch(
        _C.cuda_backward,
        device,
        dy=(dy.data_ptr(), dy.stride(0)),
        x=(x.data_ptr(), x.stride(0)) if need_A else (0, 0),
        W=(weight.data_ptr(), weight.stride(0)),
        A=lora_A.data_ptr(),
        B=lora_B.data_ptr(),
        h=(h.data_ptr(), h.stride(0)) if need_B else (0, 0),
        dx=_ptr(dx),
        dA=_ptr(dA),
        dB=_ptr(dB),
        dbias=_ptr(dbias),
        workspace=(workspace.data_ptr(), nbytes),
        sizes=sizes,
        dtypes=dtypes,
        scaling=scaling,
        dropout=dropout,
        deterministic=deterministic,
        plan=values,
    )
    return Gradients(dx, None, dA, dB, dbias)
