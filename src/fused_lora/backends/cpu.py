"""CPU back end: C++ kernels (csrc/cpu) for everything low-rank, and for the base product in one plan of two.

inside    our own product with the update, by csrc/cpu: few_rows.cpp (forward), fp32 lora_gemm.cpp, bf16 amx_gemm.cpp or
          bf16_gemm.cpp
around    PyTorch's own GEMM writes y (dx), and the kernel adds the update into it

`update` and `grouped_update`, whose base product somebody else has made, have the second plan only. The optional
tensors act within the same kernels; around PyTorch's product out_scale has a pass over dy of its own before the
backward.
"""

from functools import partial

import torch
from torch.nn import functional as F

from fused_lora import _C
from fused_lora.backends import FUSED_DTYPES, GROUPED, UPDATE, Request
from fused_lora.backends.cpu_grouped import grouped_backward_onto as grouped_backward_onto
from fused_lora.backends.cpu_grouped import grouped_update as grouped_update
from fused_lora.backends.cpu_grouped import grouped_update_backward as grouped_update_backward
from fused_lora.backends.cpu_grouped import grouped_update_onto as grouped_update_onto
from fused_lora.backends.cpu_product import LEAST_ROWS, packs
from fused_lora.ops import internals
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.reference import PLAIN, Gradients, is_plain, out_scale_columns

_FEATURES = _C.cpu_features()
_OF_FEW = {"x_lora", "out_scale"}  # the optional tensors that few_rows takes


def refusal(request: Request) -> str | None:
    """See `backends`."""
    if request.device.type != "cpu":
        return f"CPU tensors; got {request.device}"
    if request.dtype not in FUSED_DTYPES:
        return f"bfloat16, float16 and float32; got {request.dtype}"
    return None


def plans(request: Request) -> tuple[str, ...]:
    """See `backends`. Where there are instructions for "inside" it is as fast as PyTorch's product without the update,
    or faster (bench/NOTES.md); for less than LEAST_ROWS if few_rows takes them, or W is packed as it lies."""
    half = request.dtype is not torch.float32
    if request.dtype is torch.float16 or request.optional in (UPDATE, GROUPED) or (half and not _FEATURES["bf16_dot"]):
        return ("around",)
    few_rows = _OF_FEW.issuperset(request.optional) and not (half and _FEATURES["amx"])
    if request.M < LEAST_ROWS and request.aligned and not few_rows:
        return ("around",)
    # a transposed weight in bf16 is not measured on AMX; in fp32 the two directions change places, packing and all
    first = _FEATURES["avx2"] and (request.aligned or not half or not _FEATURES["amx"])
    return ("inside", "around") if first else ("around", "inside")


def summary(request: Request, plan: str) -> str:
    """See `backends`."""
    return "C++ kernels, the base product inside" if plan == "inside" else "C++ kernels around PyTorch's own GEMM"


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    M, N = x.shape[0], weight.shape[0]
    if plan == "inside" and (seed is None or packs(M, weight, 1)):  # few_rows draws no mask
        y = internals.empty_on_cpu((M, N), (N, 1), x.dtype)
        return y, _forward(y, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant)
    early, late = (bias, None) if variant.out_scale is None else (None, bias)  # the bias comes after out_scale
    y = F.linear(x, weight) if early is None else internals.linear_with_bias(x, weight, early)
    return y, _forward(y, x, None, lora_A, lora_B, late, scaling, dropout_p, seed, variant)


def update(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    """y [M, N] with the update in a tensor of its own, and h [M, R]; see `reference.update`."""
    y = y.clone(memory_format=torch.contiguous_format)
    return y, _forward(y, x, None, lora_A, lora_B, None, scaling, dropout_p, seed, PLAIN)


def _single(t: torch.Tensor) -> torch.Tensor:
    """t in fp32."""
    return t if t.dtype is torch.float32 else t.float()


def _forward(y, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant):
    """h [M, R]; y [M, N], contiguous, is written or, without the weight, updated."""
    x_lora, h_in, gate, out_scale, _ = variant
    R = lora_A.shape[0]
    h = internals.empty_on_cpu((y.shape[0], R), (R, 1), x.dtype)
    _C.cpu_forward(
        x=x,
        W=weight,
        A=lora_A,
        B=lora_B,
        bias=bias,
        h=h,
        y=y,
        scaling=scaling,
        dropout=(0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p)),
        threads=torch.get_num_threads(),
        x_lora=x_lora,
        h_in=h_in,
        gate=gate if gate is None else _single(gate),
        out_scale=out_scale if out_scale is None else _single(out_scale),
    )
    return h


def backward(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan):
    """The gradients that `needs` asks for, but for the weight's where dy is its left side; see `reference.backward`."""
    if dh is not None or not is_plain(variant):
        given = dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed
        return _backward_of_variant(*given, needs, variant, plan)
    dx, M = None, dy.shape[0]
    if needs.x and plan == "inside" and packs(M, weight, 0):
        K = weight.shape[1]
        dx = internals.empty_on_cpu((M, K), (K, 1), dy.dtype)
    elif needs.x:
        dx, weight = dy.mm(weight), None
    return _backward(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs)[0]


def backward_onto(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, plan):
    """`backward` of plain LoRA in fp32 with dx [M, K], contiguous, added to what is there."""
    if needs.x and (plan != "inside" or not packs(dy.shape[0], weight, 0)):
        dx.addmm_(dy, weight)
        weight = None
    add = {"add": True}
    return _backward(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, optional=add)[0]


def _backward_of_variant(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan):
    """The gradients with optional tensors."""
    x_lora, h_in, gate, out_scale, row_scale = variant
    (M, N), (R, K) = dy.shape, lora_A.shape
    inside, apart = plan == "inside" and packs(M, weight, 0), x_lora is not None
    dz, scaled, dscale, dbias, lost, low = dy, None, None, None, 0, needs
    if out_scale is not None:
        dscale = internals.empty_on_cpu((N,), (1,), torch.float32) if needs.out_scale else None
        scaled = _single(out_scale), y, bias, dscale
        if not inside:
            dz, dbias, lost = _scale(dy, needs, *scaled)
            scaled, low = None, low._replace(bias=False, out_scale=False)
    dx = dx_lora = dh_in = dgate = base = None
    if needs.x and inside:
        dx, base = internals.empty_on_cpu((M, K), (K, 1), dy.dtype), weight
    elif needs.x:
        dx = dz.mm(weight)
    optional = {}
    if needs.x_lora or (base is not None and apart):  # dx is dy W alone where there is a dx_lora
        optional["dx_lora"] = dx_lora = dz.new_zeros((M, K))
    if dh is not None:
        optional["dh"] = dh
    if row_scale is not None:
        optional["row_scale"] = _single(row_scale)
    if h_in is not None:
        optional["h_in"] = h_in
    if gate is not None:
        optional["gate"] = _single(gate)
    if needs.h_in:
        optional["dh_in"] = dh_in = internals.empty_on_cpu((M, R), (R, 1), dy.dtype)
    if needs.gate:
        optional["dgate"] = dgate = internals.empty_on_cpu((M, gate.shape[1]), (gate.shape[1], 1), torch.float32)
    written = None if apart and not inside else dx
    if apart or needs.weight:
        low = low._replace(x=written is not None, weight=False)
    grads = Gradients()
    if any(low):
        left = x_lora if apart else x
        given = lora_A, lora_B, h, scaling, dropout_p, seed, low, scaled, optional
        grads, now_lost = _backward(written, dz, left, base, *given)
        lost += now_lost
    if dscale is not None and lost:
        columns = dscale.isnan().nonzero().flatten()
        dscale = out_scale_columns(dscale, columns, dy, x, weight, lora_B, h, scaling, variant)
    if dscale is not None and out_scale.dtype is not torch.float32:
        dscale = dscale.to(out_scale.dtype)
    if dgate is not None and gate.dtype is not torch.float32:
        dgate = dgate.to(gate.dtype)
    dbias, dx_lora = grads.bias if dbias is None else dbias, dx_lora if needs.x_lora else None
    return Gradients(dx, None, grads.lora_A, grads.lora_B, dbias, dx_lora, dh_in, dgate, dscale)


def _scale(dy, needs, out_scale, y, bias, dscale):
    """dz = out_scale * dy, dbias if `needs` asks for it, and of how many columns of dscale y tells too little."""
    dz, N = torch.empty_like(dy, memory_format=torch.contiguous_format), dy.shape[1]
    dbias = internals.empty_on_cpu((N,), (1,), dy.dtype) if needs.bias else None
    threads, tensors = torch.get_num_threads(), dict(out_scale=out_scale, y=y, bias=bias, dout_scale=dscale)
    return dz, dbias, _C.cpu_scale(dy=dy, dz=dz, dbias=dbias, threads=threads, **tensors)


def update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """The gradients that `needs` asks for; see `reference.update_backward`."""
    dx = dy.new_zeros((dy.shape[0], lora_A.shape[1])) if needs.x else None
    return _backward(dx, dy, x, None, lora_A, lora_B, h, scaling, dropout_p, seed, needs)[0]


def _backward(
    dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, scaled=None, optional=None
) -> tuple[Gradients, int]:
    """The gradients that `needs` asks for; dx [M, K], contiguous, is written or, without the weight, updated.

    Args:
        scaled: out_scale, y, bias and out_scale's gradient, which is written, where the kernels scale dy.
        optional: the kernels' keywords of the other optional tensors.
    Returns: the gradients, and of how many columns of out_scale's y tells too little.
    """
    call = partial(_C.cpu_backward, **optional) if optional else _C.cpu_backward
    (R, K), N, adapter_dtype = lora_A.shape, dy.shape[1], lora_A.dtype
    dA = internals.empty_on_cpu((R, K), (K, 1), adapter_dtype) if needs.lora_A else None
    dB = internals.empty_on_cpu((N, R), (R, 1), adapter_dtype) if needs.lora_B else None
    dbias = internals.empty_on_cpu((N,), (1,), dy.dtype) if needs.bias else None
    lost = call(
        dy=dy,
        x=x if needs.lora_A else None,
        W=weight if needs.x else None,
        A=lora_A,
        B=lora_B,
        h=h,
        dx=dx,
        dA=dA,
        dB=dB,
        dbias=dbias,
        scaling=scaling,
        dropout=(0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p)),
        threads=torch.get_num_threads(),
        scaled=scaled,
    )
    return Gradients(dx, None, dA, dB, dbias), lost
