"""Triton back end, on every GPU that Triton serves; also in Triton's interpreter.

    forward    shrink (h), lora_gemm (y); or lora_gemm_shrink (both)
    backward   dy_pass (dh and dB), or shrink (dh) and wgrad (dB); lora_gemm (dx); wgrad (dA); or lora_gemm_shrink (dh
               and dx) where dB is not needed. What splits dy or x over its rows or columns adds a launch that sums fp32
               slabs.

With optional tensors shrink and lora_gemm take those of the forward into their epilogues, low_gradient is the
backward's shrink and scale_gradient finishes out_scale's gradient; a gradient that x_lora has apart from x is expand's.
`update` is shrink and expand, without a base product; triton_grouped.py has it for groups of rows.

Which launches serve a call is a plan of triton_kernels/configs.py, where some forms are planned on request only
(triton_plans.py has their names). Each launch is a function beside its kernel. The twin of
csrc/cuda/lora.cpp.
"""

import torch
import triton

from fused_lora.backends import FUSED_DTYPES, Request
from fused_lora.backends.triton_grouped import grouped_update, grouped_update_backward  # noqa: F401  of this back end, too
from fused_lora.backends.triton_plans import check_plan, of_backward, of_forward, plans  # noqa: F401
from fused_lora.ops import reference
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.reference import Gradients, Variant, is_plain
from fused_lora.triton_kernels.configs import backward_plan, expand_config, forward_plan, shrink_config, wgrad_config
from fused_lora.triton_kernels.device import current, facts, row_major
from fused_lora.triton_kernels.dropout import NO_DROPOUT, Dropout
from fused_lora.triton_kernels.dy_pass import dy_pass
from fused_lora.triton_kernels.expand import expand
from fused_lora.triton_kernels.lora_gemm import lora_gemm
from fused_lora.triton_kernels.lora_gemm_shrink import lora_gemm_shrink
from fused_lora.triton_kernels.low_gradient import LowGradient, low_gradient
from fused_lora.triton_kernels.scale_gradient import scale_gradient
from fused_lora.triton_kernels.shrink import gated_shrink, shrink
from fused_lora.triton_kernels.wgrad import wgrad


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None else t.contiguous()


def _laid_out(variant: Variant) -> Variant:
    """The optional tensors as the kernels read them."""
    x_lora, *others = variant
    return Variant(None if x_lora is None else row_major(x_lora), *map(_contiguous, others))


def _dropout(dropout_p: float, seed: torch.Tensor | None) -> Dropout:
    return NO_DROPOUT if seed is None else Dropout(seed, dropout_threshold(dropout_p))


def refusal(request: Request) -> str | None:
    """See `backends`."""
    interpreting = triton.knobs.runtime.interpret
    if request.device.type not in ("cuda", "xpu") and not (interpreting and request.device.type == "cpu"):
        return f"GPU tensors (or CPU tensors with TRITON_INTERPRET=1 in the environment); got {request.device}"
    if request.dtype not in FUSED_DTYPES:
        return f"bfloat16, float16 and float32; got {request.dtype}"
    return None


def summary(request: Request, plan: str) -> str:
    """See `backends`."""
    return f"Triton kernels, {plan}" if plan else "Triton kernels"


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan, launches=forward_plan):
    """y [M, N] and h [M, R]; see `reference.forward`.

    Args:
        launches: chooses the launches, from the arguments of `configs.forward_plan`; lora_gemm_shrink for plain LoRA
            only.
    """
    x, weight, lora_A, lora_B = row_major(x), row_major(weight), row_major(lora_A), row_major(lora_B)
    (M, K), (N, R) = x.shape, lora_B.shape
    if M == 0:
        return x.new_empty((0, N)), x.new_empty((0, R))
    bias = _contiguous(bias)
    x_lora, h_in, gate, out_scale, _ = variant if is_plain(variant) else _laid_out(variant)
    with current(x.device):
        said = of_forward(plan, x, weight, lora_A) if plan else {}
        p = launches(M, N, K, R, x.element_size(), seed is not None, facts(x.device), **said)
        if p.lora_gemm_shrink is not None:
            return lora_gemm_shrink(x, weight, lora_A, lora_B, bias, scaling, p.lora_gemm_shrink, right_nk=True)
        h, low = gated_shrink(
            *(x if x_lora is None else x_lora, lora_A, scaling, h_in, gate, p.shrink),
            down_rk=True,
            dropout=_dropout(dropout_p, seed),
        )
        return lora_gemm(x, weight, low, lora_B, bias, p.lora_gemm, right_nk=True, out_scale=out_scale), h


def backward(
    dy,
    dh,
    x,
    weight,
    lora_A,
    lora_B,
    h,
    y,
    bias,
    scaling,
    dropout_p,
    seed,
    needs,
    variant,
    plan,
    launches=backward_plan,
):
    """The gradients that `needs` asks for, but for the weight's of plain LoRA; see `reference.backward`.

    Args:
        launches: chooses the launches, from the arguments of `configs.backward_plan`.
    """
    if dh is not None or not is_plain(variant):
        given = dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed
        return _variant_backward(*given, needs, variant, launches)
    need_x, need_A, need_B, need_bias = needs.x, needs.lora_A, needs.lora_B, needs.bias
    dy, weight, lora_A, lora_B = row_major(dy), row_major(weight), row_major(lora_A), row_major(lora_B)
    (M, N), (R, K) = dy.shape, lora_A.shape
    if M == 0:
        return Gradients(
            x=dy.new_empty((0, K)) if need_x else None,
            lora_A=lora_A.new_zeros((R, K)) if need_A else None,
            lora_B=lora_B.new_zeros((N, R)) if need_B else None,
            bias=dy.new_zeros((N,)) if need_bias else None,
        )
    dropout, h = _dropout(dropout_p, seed), h.contiguous() if need_B else None
    dx = dh = dA = dB = None
    with current(dy.device):
        said = of_backward(plan, dy, weight, lora_B) if plan else {}
        sizes = M, N, K, R, dy.element_size(), seed is not None, need_x, need_A, need_B
        p = launches(*sizes, facts(dy.device), **said)
        if p.lora_gemm_shrink is not None:
            dx, dh = lora_gemm_shrink(dy, weight, lora_B, lora_A, None, scaling, p.lora_gemm_shrink, right_nk=False)
        if p.dy_pass is not None:
            dh, dB = dy_pass(dy, lora_B, h, scaling, p.dy_pass)
        if p.shrink is not None:
            dh = shrink(dy, lora_B, scaling, p.shrink, down_rk=False)
        if p.wgrad_B is not None:
            dB = wgrad(h, dy, lora_B.dtype, p.wgrad_B, transposed=True)
        if p.lora_gemm is not None:
            dx = lora_gemm(dy, weight, dh, lora_A, None, p.lora_gemm, right_nk=False, dropout=dropout)
        if p.wgrad_A is not None:
            dA = wgrad(dh, row_major(x), lora_A.dtype, p.wgrad_A, dropout=dropout)
        return Gradients(x=dx, lora_A=dA, lora_B=dB, bias=dy.sum(0) if need_bias else None)


def _wanted(needs: Gradients, variant: Variant) -> LowGradient:
    """What low_gradient must write for the gradients that `needs` asks for."""
    gated = variant.gate is not None or variant.h_in is not None
    return LowGradient(
        dz=variant.out_scale is not None and (needs.x or needs.weight),
        sums=needs.out_scale,
        dh=(needs.x if variant.x_lora is None else needs.x_lora) or (needs.lora_A and variant.grad_row_scale is None),
        dh_c=needs.lora_A and variant.grad_row_scale is not None,
        dh_in=needs.h_in,
        dgate=needs.gate,
        low=gated and (needs.lora_B or needs.out_scale),
    )


def _variant_backward(
    dy, dh_out, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant, launches
):
    """`backward` with optional tensors, or with the gradient dh_out of the returned h."""
    if dy.shape[0] == 0:
        given = dy, dh_out, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed
        return reference.backward(*given, needs, variant)
    dy, lora_A, lora_B, variant = row_major(dy), row_major(lora_A), row_major(lora_B), _laid_out(variant)
    x, weight, y = (t if t is None else row_major(t) for t in (x, weight, y))
    h, bias, dh_out, dropout = _contiguous(h), _contiguous(bias), _contiguous(dh_out), _dropout(dropout_p, seed)
    x_lora, h_in, gate, out_scale, row_scale = variant
    (M, N), (R, K), wanted = dy.shape, lora_A.shape, _wanted(needs, variant)
    sizes = M, N, K, R, dy.element_size(), seed is not None, needs.x and x_lora is None, needs.lora_A, needs.lora_B
    with current(dy.device):
        p = launches(*sizes, facts(dy.device), plain=False)
        optional = out_scale, row_scale, y, bias, h, h_in, gate, dh_out
        made = low_gradient(dy, lora_B, *optional, scaling, wanted, p.low_gradient) if any(wanted) else LowGradient()
        dz, low = dy if made.dz is None else made.dz, h if made.low is None else made.low
        grads = {}
        if needs.x and x_lora is None:
            grads["x"] = lora_gemm(dz, weight, made.dh, lora_A, None, p.lora_gemm, right_nk=False, dropout=dropout)
        elif needs.x:
            grads["x"] = dz.mm(weight)
        if needs.x_lora:
            c = expand_config(M, K, R, dy.element_size())
            grads["x_lora"] = expand(made.dh, lora_A, None, c, thin_nr=False, dropout=dropout)
        if needs.weight:
            grads["weight"] = dz.t().mm(x)
        if needs.lora_A:
            dh, left = made.dh if row_scale is None else made.dh_c, x if x_lora is None else x_lora
            grads["lora_A"] = wgrad(dh, left, lora_A.dtype, p.wgrad_A, dropout=dropout)
        if needs.lora_B:
            scale = out_scale if row_scale is None else row_scale if out_scale is None else out_scale * row_scale
            grads["lora_B"] = wgrad(low, dy, lora_B.dtype, p.wgrad_B, transposed=True, column_scale=scale)
        if needs.gate:
            dgate = made.dgate if gate.shape[1] == R else made.dgate.unflatten(1, (gate.shape[1], -1)).sum(-1)
            grads["gate"] = dgate.to(gate.dtype)
        if needs.out_scale:
            grads["out_scale"] = scale_gradient(made.sums, dy, x, weight, low, lora_B, out_scale, bias)
        return Gradients(**grads, bias=dy.sum(0) if needs.bias else None, h_in=made.dh_in)


def update(y, x, lora_A, lora_B, scaling, dropout_p, seed):
    """y [M, N] with the update in a tensor of its own, and h [M, R]; see `reference.update`."""
    y, x, lora_A, lora_B = row_major(y), row_major(x), row_major(lora_A), row_major(lora_B)
    (M, K), (N, R), itemsize = x.shape, lora_B.shape, x.element_size()
    if M == 0:
        return y.new_empty((0, N)), x.new_empty((0, R))
    with current(x.device):
        c = shrink_config(M, K, R, itemsize, facts(x.device))
        h = shrink(x, lora_A, scaling, c, down_rk=True, dropout=_dropout(dropout_p, seed))
        return expand(h, lora_B, y, expand_config(M, N, R, itemsize), thin_nr=True), h


def update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """The gradients that `needs` asks for; see `reference.update_backward`."""
    if dy.shape[0] == 0:
        return reference.update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs)
    dy, lora_A, lora_B, dropout = row_major(dy), row_major(lora_A), row_major(lora_B), _dropout(dropout_p, seed)
    (M, N), (R, K), itemsize, device = dy.shape, lora_A.shape, dy.element_size(), facts(dy.device)
    dx = dA = dB = None
    with current(dy.device):
        if needs.x or needs.lora_A:
            dh = shrink(dy, lora_B, scaling, shrink_config(M, N, R, itemsize, device), down_rk=False)
        if needs.x:
            dx = expand(dh, lora_A, None, expand_config(M, K, R, itemsize), thin_nr=False, dropout=dropout)
        if needs.lora_A:
            dA = wgrad(dh, row_major(x), lora_A.dtype, wgrad_config(M, K, R, itemsize, device), dropout=dropout)
        if needs.lora_B:
            c = wgrad_config(M, N, R, itemsize, device)
            dB = wgrad(h.contiguous(), dy, lora_B.dtype, c, transposed=True)
        return Gradients(x=dx, lora_A=dA, lora_B=dB)
