"""What is wrong with the arguments of the ops: shapes, dtypes, devices, names; metadata only.

Each check returns the error, or None: who calls it raises, before anything is computed.
"""

import difflib
import itertools
from typing import Any

import torch
from torch import Tensor

from fused_lora.backends import NAMES
from fused_lora.ops.reference import Variant

_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def fault(x, weight, lora_A, lora_B, bias, dropout_p, backend) -> ValueError | None:
    """The first thing that is wrong with the arguments of `lora_linear`, None if nothing is."""
    named = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    wrong = _no_tensor(named)
    if wrong is not None:
        return wrong
    if not isinstance(bias, Tensor | None):
        return ValueError(f"bias must be a torch.Tensor or None; got {type(bias).__name__}")
    if weight.dim() != 2 or weight.numel() == 0:
        return ValueError(f"weight must have shape [N, K] with N, K >= 1; got {_shape(weight)}")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        return ValueError(f"x must have shape [..., {K}] to match weight {_shape(weight)}; got {_shape(x)}")
    if lora_A.dim() != 2 or lora_A.shape[0] < 1 or lora_A.shape[1] != K:
        return ValueError(f"lora_A must have shape [R, {K}] with R >= 1 to match x[..., {K}]; got {_shape(lora_A)}")
    R = lora_A.shape[0]
    if lora_B.shape != (N, R):
        return ValueError(
            f"lora_B must have shape [{N}, {R}] to match weight {_shape(weight)} and lora_A {_shape(lora_A)}; got "
            f"{_shape(lora_B)}"
        )
    if bias is not None:
        named["bias"] = bias
    wrong = _not_dense(named) or _no_dtype_of_ours(x)
    if wrong is not None:
        return wrong
    if weight.dtype != x.dtype:
        return ValueError(f"weight must have x's dtype {x.dtype}; got {weight.dtype}")
    wrong = _wrong_adapter_dtype(x, lora_A, lora_B)
    if wrong is not None:
        return wrong
    if bias is not None and bias.shape != (N,):
        return ValueError(f"bias must have shape [{N}] to match weight {_shape(weight)}; got {_shape(bias)}")
    if bias is not None and bias.dtype != x.dtype:
        return ValueError(f"bias must have x's dtype {x.dtype}; got {bias.dtype}")
    return _elsewhere(named, x) or _wrong_settings(dropout_p, backend)


def update_fault(y, x, lora_A, lora_B, dropout_p, backend) -> ValueError | None:
    """The first thing that is wrong with the arguments of `lora_update`, None if nothing is."""
    named = {"y": y, "x": x, "lora_A": lora_A, "lora_B": lora_B}
    wrong = _no_tensor(named) or _not_dense(named)
    if wrong is not None:
        return wrong
    Y, X, A, B = map(_shape, named.values())
    if len(A) != 2 or min(A) < 1:
        return ValueError(f"lora_A must have shape [R, K] with R, K >= 1; got {A}")
    if len(X) == 0 or X[-1] != A[1]:
        return ValueError(f"x must have shape [..., {A[1]}] to match lora_A {A}; got {X}")
    if len(B) != 2 or B[0] < 1 or B[1] != A[0]:
        return ValueError(f"lora_B must have shape [N, {A[0]}] with N >= 1 to match lora_A {A}; got {B}")
    if [*X[:-1], B[0]] != Y:
        return ValueError(f"y must have shape {[*X[:-1], B[0]]} to match x {X} and lora_B {B}; got {Y}")
    wrong = _no_dtype_of_ours(x)
    if wrong is not None:
        return wrong
    if not y.dtype.is_floating_point:
        return ValueError(f"y must have a floating dtype; got {y.dtype}")
    return _elsewhere(named, x) or _wrong_adapter_dtype(x, lora_A, lora_B) or _wrong_settings(dropout_p, backend)


def grouped_fault(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, backend) -> ValueError | None:
    """The first thing that is wrong with the arguments of `grouped_lora_update`, the factors as lists, None if nothing
    is."""
    named = {"y": y, "x": x, "offsets": offsets} | ({} if rows is None else {"rows": rows})
    wrong = _no_tensor(named) or _not_dense(named)
    if wrong is not None:
        return wrong
    for name, t in (("offsets", offsets), ("rows", rows)):
        if t is not None and (t.dtype not in (torch.int64, torch.int32) or t.dim() != 1):
            expected = "[G + 1]" if name == "offsets" else "[M']"
            return ValueError(f"{name} must be int64 or int32 of shape {expected}; got {t.dtype} {_shape(t)}")
    G = offsets.shape[0] - 1
    if G < 1:
        return ValueError(f"offsets must have shape [G + 1] with G >= 1; got {_shape(offsets)}")
    wrong = _wrong_factors(lora_A, lora_B, G) or _wrong_settings(dropout_p, backend)
    if wrong is not None:
        return wrong
    K, N, X, Y = lora_A[0].shape[-1], lora_B[0].shape[-2], _shape(x), _shape(y)
    if len(X) == 0 or X[-1] != K:
        return ValueError(f"x must have shape [..., {K}] to match lora_A; got {X}")
    if [*X[:-1], N] != Y:
        return ValueError(f"y must have shape {[*X[:-1], N]} to match x {X} and lora_B; got {Y}")
    wrong = _no_dtype_of_ours(x)
    if wrong is not None:
        return wrong
    if not y.dtype.is_floating_point:
        return ValueError(f"y must have a floating dtype; got {y.dtype}")
    if isinstance(scaling, Tensor):
        named["scaling"] = scaling
    wrong = _elsewhere(named, x)
    if wrong is not None:
        return wrong
    dtype, device = lora_A[0].dtype, x.device
    for g in range(max(len(lora_A), len(lora_B))):
        A, B = lora_A[min(g, len(lora_A) - 1)], lora_B[min(g, len(lora_B) - 1)]
        if g and A.dtype is dtype and B.dtype is dtype and A.device == device and B.device == device:
            continue
        wrong = _elsewhere({"lora_A": A, "lora_B": B}, x) or _wrong_adapter_dtype(x, A, B)
        if wrong is None and A.dtype is not dtype:
            wrong = ValueError(f"lora_A must have one dtype in all groups; got {dtype} and, of group {g}, {A.dtype}")
        if wrong is not None:
            return wrong
    return None


def _wrong_factors(lora_A, lora_B, G: int) -> ValueError | None:
    """What is wrong with the shapes of the factors of G groups: lists of as many matrices, or of one stack."""
    for name, factors, shape in (("lora_A", lora_A, "R, K"), ("lora_B", lora_B, "N, R")):
        for t in factors:
            if not isinstance(t, Tensor):
                return ValueError(f"{name} must hold tensors; got a {type(t).__name__}")
            if t.layout is not torch.strided:
                return ValueError(f"{name} must hold dense tensors; got layout {t.layout}")
        stacked = len(factors) == 1 and factors[0].dim() == 3
        if stacked and factors[0].shape[0] in (1, G) and factors[0].numel():
            continue
        if stacked or len(factors) != G or not all(t.dim() == 2 and t.numel() for t in factors):
            got = _shape(factors[0]) if stacked else [_shape(t) for t in factors[:4]]
            more = f", {len(factors)} in all" if len(factors) > 4 else ""
            return ValueError(
                f"{name} must be {G} tensors [{shape}] to match offsets [{G + 1}], or one of shape [{G}, {shape}] or "
                f"[1, {shape}]; got {got}{more}"
            )
    (_, K), (N, _) = lora_A[0].shape[-2:], lora_B[0].shape[-2:]
    for g in range(max(len(lora_A), len(lora_B))):
        A, B = lora_A[min(g, len(lora_A) - 1)], lora_B[min(g, len(lora_B) - 1)]
        if A.shape[-1] != K:
            return ValueError(f"lora_A must have the same K in all groups; got {K} and, of group {g}, {A.shape[-1]}")
        if B.shape[-2] != N:
            return ValueError(f"lora_B must have the same N in all groups; got {N} and, of group {g}, {B.shape[-2]}")
        if A.shape[-2] != B.shape[-1]:
            return ValueError(
                f"lora_B must have lora_A's rank in each group; got ranks {B.shape[-1]} and {A.shape[-2]} of group {g}"
            )
    return None


def segments_fault(offsets: Tensor, rows: Tensor | None, M: int) -> ValueError | None:
    """What is wrong with the values of the segments of M rows, which lie on the CPU; None if nothing is."""
    bounds = offsets.tolist()
    last, what = (M, "the rows of x") if rows is None else (rows.shape[0], "rows")
    if bounds[0] != 0 or bounds[-1] != last or any(a > b for a, b in itertools.pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        return ValueError(f"offsets must ascend from 0 to {last} to cover {what}; got {shown}")
    if rows is not None and last:
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= M:
            return ValueError(f"rows must be in [0, {M}), the rows of x; got {low if low < 0 else high}")
        if last > M or int(torch.bincount(rows, minlength=M).max()) > 1:
            return ValueError(f"rows must name each row once at most; got {last} with repetitions")
    return None


def _no_tensor(named: dict[str, Any]) -> ValueError | None:
    for name, t in named.items():
        if not isinstance(t, Tensor):
            return ValueError(f"{name} must be a torch.Tensor; got {type(t).__name__}")
        if t.is_nested and t.layout is torch.strided:  # which has no shape
            return ValueError(f"{name} must be a dense tensor, or nested with layout=torch.jagged; got nested, strided")
    return None


def _not_dense(named: dict[str, Tensor]) -> ValueError | None:
    for name, t in named.items():
        if t.layout not in (torch.strided, torch.jagged):
            return ValueError(f"{name} must be a dense tensor; got layout {t.layout}")
    return None


def _elsewhere(named: dict[str, Tensor], x: Tensor) -> ValueError | None:
    for name, t in named.items():
        if t.device != x.device:
            return ValueError(f"{name} must be on x's device {x.device}; got {t.device}")
    return None


def _no_dtype_of_ours(x: Tensor) -> ValueError | None:
    if x.dtype not in _DTYPES:
        return ValueError(f"x must be bfloat16, float16, float32 or float64; got {x.dtype}")
    return None


def _wrong_adapter_dtype(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> ValueError | None:
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if t.dtype not in (x.dtype, torch.float32):
            return ValueError(f"{name} must have x's dtype {x.dtype} or float32; got {t.dtype}")
    if lora_A.dtype != lora_B.dtype:
        return ValueError(f"lora_B must have lora_A's dtype {lora_A.dtype}; got {lora_B.dtype}")
    return None


def _wrong_settings(dropout_p, backend) -> ValueError | None:
    if not isinstance(dropout_p, int | float) or not 0.0 <= dropout_p < 1.0:
        return ValueError(f"dropout_p must be in [0, 1); got {dropout_p}")
    name, named_plan, plan = str(backend).partition(":")
    if name not in NAMES or (named_plan and (not plan or name == "auto")):
        near = [each for each in difflib.get_close_matches(name, NAMES, 1) if each != name]
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return ValueError(f"backend must be one of {', '.join(NAMES)}; got {backend!r}{hint}")
    return None


def check_variant(x: Tensor, weight: Tensor, lora_A: Tensor, variant: Variant) -> None:
    """Raises ValueError for an optional tensor that is none, or of a wrong shape, dtype, layout or device."""
    x_lora, h_in, gate, out_scale, grad_row_scale = variant
    N, R = weight.shape[0], lora_A.shape[0]
    lead = tuple(x.shape[:-1])
    named = {name: t for name, t in variant._asdict().items() if t is not None}
    wrong = _no_tensor(named) or _not_dense(named) or _elsewhere(named, x)
    if wrong is not None:
        raise wrong
    if x_lora is not None and (x_lora.shape != x.shape or x_lora.dtype != x.dtype):
        raise ValueError(
            f"x_lora must have x's shape {_shape(x)} and dtype {x.dtype}; got {_shape(x_lora)} and {x_lora.dtype}"
        )
    if h_in is not None and (tuple(h_in.shape) != (*lead, R) or h_in.dtype != x.dtype):
        raise ValueError(f"h_in must have shape {[*lead, R]} and dtype {x.dtype}; got {_shape(h_in)} and {h_in.dtype}")
    if gate is not None and not gate.dtype.is_floating_point:
        raise ValueError(f"gate must have a floating dtype; got {gate.dtype}")
    blocks = 0 if gate is None or gate.dim() == 0 else gate.shape[-1]
    if gate is not None and (blocks < 1 or tuple(gate.shape[:-1]) != lead or R % blocks):
        raise ValueError(f"gate must have shape {[*lead, 'k']} with k dividing R = {R}; got {_shape(gate)}")
    for name, t in (("out_scale", out_scale), ("grad_row_scale", grad_row_scale)):
        if t is not None and (tuple(t.shape) != (N,) or t.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"{name} must have shape [{N}] and dtype float32; got {_shape(t)} and {t.dtype}")


def check_out_norm(x: Tensor, out_norm: Any, out_scale: Tensor | None) -> None:
    """Raises ValueError unless out_norm can divide this out_scale, which is right itself."""
    named = {"out_norm": out_norm}
    wrong = _no_tensor(named) or _not_dense(named)
    if wrong is not None:
        raise wrong
    if out_scale is None:
        raise ValueError(f"out_norm must be None without an out_scale; got a tensor of shape {_shape(out_norm)}")
    if out_norm.shape != out_scale.shape or out_norm.dtype not in (torch.float32, torch.float64):
        expected = f"out_scale's shape {_shape(out_scale)} and dtype float32"
        raise ValueError(f"out_norm must have {expected}; got {_shape(out_norm)} and {out_norm.dtype}")
    if out_norm.requires_grad:
        raise ValueError("out_norm must not require a gradient (divide out_scale by it instead); got one that does")
    wrong = _elsewhere(named, x)
    if wrong is not None:
        raise wrong
