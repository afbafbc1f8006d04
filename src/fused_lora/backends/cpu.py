"""CPU back end: C++ kernels (csrc/cpu) for everything low-rank, and for the base product in one plan of two.

inside    our own product with the update, by csrc/cpu: few_rows.cpp (forward), fp32 lora_gemm.cpp, bf16 amx_gemm.cpp or
          bf16_gemm.cpp
around    PyTorch's own GEMM writes y (dx), and the kernel adds the update into it

`update` and `grouped_update`, whose base product somebody else has made, have the second plan only. The optional
tensors act within the same kernels; around PyTorch's product out_scale has a pass over dy of its own before the
backward.
"""

from array import array
from functools import partial

import torch
from torch.nn import functional as F

from fused_lora import _C
from fused_lora.backends import FUSED_DTYPES, GROUPED, UPDATE, Request
from fused_lora.backends.cpu_grouped import grouped_backward_onto as grouped_backward_onto
from fused_lora.backends.cpu_grouped import grouped_update as grouped_update
from fused_lora.backends.cpu_grouped import grouped_update_backward as grouped_update_backward
from fused_lora.backends.cpu_grouped import grouped_update_onto as grouped_update_onto
from fused_lora.backends.cpu_product import LEAST_ROWS, laid, packs
from fused_lora.ops import internals
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.reference import PLAIN, Gradients, Variant, out_scale_columns

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}
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


def _rows(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """t, not contiguous, with neighbouring columns adjacent in memory, and its row stride, which may be any."""
    return (t, t.stride(0)) if t.stride(1) == 1 else (t.contiguous(), t.shape[1])


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan):
    """y [M, N] and h [M, R]; see `reference.forward`."""
    if plan == "inside" and (seed is None or packs(x.shape[0], weight.stride(1))):  # few_rows draws no mask
        y = internals.empty_on_cpu((x.shape[0], weight.shape[0]), (weight.shape[0], 1), x.dtype)
        return y, _forward(y, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant)
    early, late = (bias, None) if variant.out_scale is None else (None, bias)  # the bias comes after out_scale
    y = F.linear(x, weight) if early is None else internals.linear_with_bias(x, weight, early)
    return y, _forward(y, x, None, lora_A, lora_B, late, scaling, dropout_p, seed, variant)


def update(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    """y [M, N] with the update in a tensor of its own, and h [M, R]; see `reference.update`."""
    y = y.clone(memory_format=torch.contiguous_format)
    return y, _forward(y, x, None, lora_A, lora_B, None, scaling, dropout_p, seed, PLAIN)


def _between(variant: Variant) -> tuple[list, dict]:
    """What acts on h, as the kernels take it, and the tensors to keep until they are through."""
    kept: list[torch.Tensor] = []
    given: dict[str, int | tuple[int, int]] = {}
    if variant.h_in is not None:
        kept.append(variant.h_in.contiguous())
        given["h_in"] = kept[-1].data_ptr()
    if variant.gate is not None:
        kept.append(_single(variant.gate))
        given["gate"] = kept[-1].data_ptr(), variant.gate.shape[1]
    return kept, given


def _single(t: torch.Tensor) -> torch.Tensor:
    """t in fp32 and contiguous: itself if it is."""
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.to(torch.float32).contiguous()


def _forward(y, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant):
    """h [M, R]; y [M, N], contiguous, is written or, without the weight, updated."""
    call = _C.cpu_forward
    if variant is not PLAIN:
        kept, given = _between(variant)
        if variant.x_lora is not None:
            x_lora, ldx_lora = _rows(variant.x_lora)
            kept.append(x_lora)
            given["x_lora"] = x_lora.data_ptr(), ldx_lora
        if variant.out_scale is not None:
            kept.append(_single(variant.out_scale))
            given["out_scale"] = kept[-1].data_ptr()
        call = partial(call, **given)
    lora_A, lora_B, dtype = lora_A.contiguous(), lora_B.contiguous(), x.dtype
    (M, K), (N, R) = x.shape, lora_B.shape
    x, ldx = (x, K) if x.is_contiguous() else _rows(x)
    h = internals.empty_on_cpu((M, R), (R, 1), dtype)
    W, bias_ptr = (0, 0, False), 0
    if weight is not None:
        weight, ldw, transposed = laid(weight)
        W = weight.data_ptr(), ldw, transposed
    if bias is not None:
        bias = bias.contiguous()
        bias_ptr = bias.data_ptr()
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    call(
        x=(x.data_ptr(), ldx),
        W=W,
        A=lora_A.data_ptr(),
        B=lora_B.data_ptr(),
        bias=bias_ptr,
        h=h.data_ptr(),
        y=y.data_ptr(),
        sizes=(M, N, K, R),
        dtypes=(_CODE[dtype], _CODE[lora_A.dtype]),
        scaling=scaling,
        dropout=dropout,
        threads=torch.get_num_threads(),
    )
    return h


def backward(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan):
    """The gradients that `needs` asks for, but for the weight's where dy is its left side; see `reference.backward`."""
    if variant is not PLAIN or dh is not None:
        given = dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed
        return _backward_of_variant(*given, needs, variant, plan)
    dx = None
    if needs.x and plan == "inside" and packs(dy.shape[0], weight.stride(0)):
        dx = internals.empty_on_cpu((dy.shape[0], weight.shape[1]), (weight.shape[1], 1), dy.dtype)
    elif needs.x:
        dx, weight = dy.mm(weight), None
    return _backward(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs)


def backward_onto(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, plan):
    """`backward` of plain LoRA in fp32 with dx [M, K], contiguous, added to what is there."""
    if needs.x and (plan != "inside" or not packs(dy.shape[0], weight.stride(0))):
        dx.addmm_(dy, weight)
        weight = None
    return _backward(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, add=True)


def _backward_of_variant(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, plan):
    """The gradients with optional tensors."""
    M, (R, K), dz, dbias, dscale, lost = dy.shape[0], lora_A.shape, dy, None, None, (0,)
    (kept, given), inside = _between(variant), plan == "inside" and packs(M, weight.stride(0))
    scaled, apart = variant.out_scale is not None, variant.x_lora is not None
    if scaled:
        dscale, lost, keywords = _scaling(variant.out_scale, y, bias, needs, kept)
        if inside:
            given |= keywords
        else:
            dz, dbias = _scale(dy, needs, keywords)
    dx = dx_lora = base = None
    if needs.x and inside:
        dx, base = internals.empty_on_cpu((M, K), (K, 1), dy.dtype), weight
    elif needs.x:
        dx = dz.mm(weight)
    if needs.x_lora or (base is not None and apart):  # dx is dy W alone where there is a dx_lora
        dx_lora = dz.new_zeros((M, K))
        given["dx_lora"] = dx_lora.data_ptr()
    if dh is not None:
        kept.append(dh.contiguous())
        given["dh"] = kept[-1].data_ptr()
    if variant.grad_row_scale is not None:
        kept.append(_single(variant.grad_row_scale))
        given["row_scale"] = kept[-1].data_ptr()
    dh_in = internals.empty_on_cpu((M, R), (R, 1), dy.dtype) if needs.h_in else None
    dgate = torch.empty(M, variant.gate.shape[1]) if needs.gate else None
    given |= {name: t.data_ptr() for name, t in (("dh_in", dh_in), ("dgate", dgate)) if t is not None}
    written, late = None if apart and not inside else dx, scaled and not inside
    low = needs._replace(x=written is not None, weight=False) if apart or needs.weight or late else needs
    low = low._replace(bias=False, out_scale=False) if late else low
    grads = Gradients()
    if any(low):
        left = variant.x_lora if apart else x
        grads = _backward(written, dz, left, base, lora_A, lora_B, h, scaling, dropout_p, seed, low, given)
    if dscale is not None and lost[0]:
        columns = dscale.isnan().nonzero().flatten()
        dscale = out_scale_columns(dscale, columns, dy, x, weight, lora_B, h, scaling, variant)
    if dscale is not None and variant.out_scale.dtype is not torch.float32:
        dscale = dscale.to(variant.out_scale.dtype)
    if dgate is not None and variant.gate.dtype is not torch.float32:
        dgate = dgate.to(variant.gate.dtype)
    dbias, dx_lora = grads.bias if dbias is None else dbias, dx_lora if needs.x_lora else None
    return Gradients(dx, None, grads.lora_A, grads.lora_B, dbias, dx_lora, dh_in, dgate, dscale)


def _scaling(out_scale, y, bias, needs, kept):
    """The gradient of out_scale, if it is needed, of how many columns y tells too little for it, and what the kernels
    take of out_scale."""
    kept.append(_single(out_scale))
    keywords = {"out_scale": kept[-1].data_ptr()}
    if not needs.out_scale:
        return None, (0,), keywords
    (y, ldy), lost = _rows(y), array("q", (0,))
    dscale = internals.empty_on_cpu((out_scale.shape[0],), (1,), torch.float32)
    kept.append(y)
    keywords |= {"y": (y.data_ptr(), ldy), "dout_scale": (dscale.data_ptr(), lost.buffer_info()[0])}
    if bias is not None:
        kept.append(bias.contiguous())
        keywords["bias"] = kept[-1].data_ptr()
    return dscale, lost, keywords


def _scale(dy, needs, keywords):
    """dz = out_scale * dy, and dbias if `needs` asks for it, in the pass that makes out_scale's gradient, too."""
    dy, lddy = _rows(dy)
    M, N = dy.shape
    dz = torch.empty(M, N, dtype=dy.dtype)
    dbias = torch.empty(N, dtype=dy.dtype) if needs.bias else None
    keywords = {"y": (0, 0), "dout_scale": (0, 0), "bias": 0} | keywords
    _C.cpu_scale(
        dy=(dy.data_ptr(), lddy),
        dz=dz.data_ptr(),
        dbias=0 if dbias is None else dbias.data_ptr(),
        sizes=(M, N),
        dtype=_CODE[dy.dtype],
        threads=torch.get_num_threads(),
        **keywords,
    )
    return dz, dbias


def update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """The gradients that `needs` asks for; see `reference.update_backward`."""
    dx = dy.new_zeros((dy.shape[0], lora_A.shape[1])) if needs.x else None
    return _backward(dx, dy, x, None, lora_A, lora_B, h, scaling, dropout_p, seed, needs)


def _backward(dx, dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, optional=None, add=False):
    """The gradients that `needs` asks for; dx [M, K], contiguous, is written or, without the weight, updated.

    `optional`: the kernels' keywords of the optional tensors, or None. `add`: to what dx holds.
    """
    call = _C.cpu_backward if optional is None else partial(_C.cpu_backward, **optional)
    lora_A, lora_B, dtype, adapter_dtype = lora_A.contiguous(), lora_B.contiguous(), dy.dtype, lora_A.dtype
    (M, N), (R, K) = dy.shape, lora_A.shape
    dy, lddy = (dy, N) if dy.is_contiguous() else _rows(dy)
    dA = dB = dbias = None
    dx_ptr = dA_ptr = dB_ptr = dbias_ptr = x_ptr = ldx = h_ptr = 0
    W = 0, 0, False
    if needs.x:
        dx_ptr = dx.data_ptr()
        if weight is not None:
            weight, ldw, transposed = laid(weight)
            W = weight.data_ptr(), ldw, transposed
    if needs.lora_A:
        x, ldx = (x, K) if x.is_contiguous() else _rows(x)
        dA = internals.empty_on_cpu((R, K), (K, 1), adapter_dtype)
        x_ptr, dA_ptr = x.data_ptr(), dA.data_ptr()
    if needs.lora_B or needs.gate:
        h = h.contiguous()
        h_ptr = h.data_ptr()
    if needs.lora_B:
        dB = internals.empty_on_cpu((N, R), (R, 1), adapter_dtype)
        dB_ptr = dB.data_ptr()
    if needs.bias:
        dbias = internals.empty_on_cpu((N,), (1,), dtype)
        dbias_ptr = dbias.data_ptr()
    dropout = (0, 0) if seed is None else (seed.data_ptr(), dropout_threshold(dropout_p))
    call(
        dy=(dy.data_ptr(), lddy),
        x=(x_ptr, ldx),
        W=W,
        A=lora_A.data_ptr(),
        B=lora_B.data_ptr(),
        h=h_ptr,
        dx=(dx_ptr, add),
        dA=dA_ptr,
        dB=dB_ptr,
        dbias=dbias_ptr,
        sizes=(M, N, K, R),
        dtypes=(_CODE[dtype], _CODE[adapter_dtype]),
        scaling=scaling,
        dropout=dropout,
        threads=torch.get_num_threads(),
    )
    return Gradients(dx, None, dA, dB, dbias)
