"""The maths of the op in plain PyTorch, forward and explicit backward: ground truth and last-resort back end.

    y  = out_scale * ( x Wt + s * ((x_lora At + h_in) * gate) Bt ) + bias

Works in every floating dtype on every device. `h` below is `s * x_lora At` in x's dtype, the only tensor the plain LoRA
saves beside x.
Source: Hu et al., "LoRA", arXiv 2106.09685; variants: DoRA (out_scale) 2402.09353, ALLoRA (grad_row_scale) 2410.09692,
ResLoRA (x_lora, h_in) 2402.18039, LoRA-Flow (gate) 2402.11455.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.ops.dropout import dropout_mask
from fused_lora.ops.grouped_reference import grouped_update as grouped_update  # as a back end has them
from fused_lora.ops.grouped_reference import grouped_update_backward as grouped_update_backward
from fused_lora.ops.internals import without_autocast


class Variant(NamedTuple):
    """The op's optional tensors; all None is plain LoRA."""

    x_lora: Tensor | None = None  # [M, K], input of the low-rank path instead of x
    h_in: Tensor | None = None  # [M, R], added to x_lora At
    gate: Tensor | None = None  # [M, k], k divides R: factor of each block of R / k ranks
    out_scale: Tensor | None = None  # [N], fp32
    grad_row_scale: Tensor | None = None  # [N], fp32; scales row n of the gradient of B A, not dx


class Gradients(NamedTuple):
    """An entry per differentiable input: its gradient, None where not asked for; or, as `needs`, whether it is asked
    for."""

    x: Any = None
    weight: Any = None
    lora_A: Any = None
    lora_B: Any = None
    bias: Any = None
    x_lora: Any = None
    h_in: Any = None
    gate: Any = None
    out_scale: Any = None


PLAIN = Variant()


def is_plain(variant: Variant) -> bool:
    """Whether there is no optional tensor. It asks what it holds: torch.compile has no guard for which object it is."""
    x_lora, h_in, gate, out_scale, grad_row_scale = variant
    return x_lora is None and h_in is None and gate is None and out_scale is None and grad_row_scale is None


def _gated(t: Tensor, variant: Variant) -> Tensor:
    """t [M, R] times gate [M, k], each gate for R / k neighbouring ranks."""
    if variant.gate is None:
        return t
    return t * variant.gate.to(t.dtype).repeat_interleave(t.shape[1] // variant.gate.shape[1], dim=1)


def _lora_input(x: Tensor | None, variant: Variant, mask: Tensor | None) -> Tensor:
    given: Any = x if variant.x_lora is None else variant.x_lora
    return given if mask is None else given * mask


def _ungated(h: Tensor, scaling: float, variant: Variant) -> Tensor:
    return h if variant.h_in is None else h + scaling * variant.h_in


def _low(h: Tensor, scaling: float, variant: Variant) -> Tensor:
    """(h + s h_in) * gate, the left operand of the low-rank update, [M, R]."""
    return _gated(_ungated(h, scaling, variant), variant)


def refusal(request) -> None:
    """It serves every request."""


def plans(request) -> tuple[str, ...]:
    """One way."""
    return ("",)


def summary(request, plan) -> str:
    """What it runs, in a phrase."""
    return "the PyTorch composition"


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant=PLAIN, plan="") -> tuple[Tensor, Tensor]:
    """y [M, N] and h = s * drop(x_lora) At [M, R], both in x's dtype; arguments as in `lora_linear`, x 2-D."""
    mask = None if seed is None else dropout_mask(seed, x.shape[0], x.shape[1], dropout_p, x.dtype)
    h = (_lora_input(x, variant, mask) @ lora_A.to(x.dtype).t()).mul_(scaling)
    scaled = variant.out_scale is not None
    y = torch.addmm(F.linear(x, weight, None if scaled else bias), _low(h, scaling, variant), lora_B.to(x.dtype).t())
    if scaled:  # in the wider dtype, and rounded once
        y = y * variant.out_scale
        y = (y if bias is None else y + bias).to(x.dtype)
    return y, h


def backward(
    dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, needs, variant=PLAIN, plan=""
) -> Gradients:
    """Every gradient that `needs`, a `Gradients` of bools, asks for.

    Args:
        dy: gradient of y, [M, N].
        dh: gradient of the returned h, [M, R], or None.
        x, h: input and output of `forward`; None where no needed gradient uses them.
        y, bias: output and input of `forward`, for the gradient of out_scale only; else None.
        The others as in `forward`.
    """
    dtype, A, B = dy.dtype, lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    dz = dy if variant.out_scale is None else (dy * variant.out_scale).to(dtype)
    masked = seed is not None and (needs.x or needs.x_lora or needs.lora_A)
    mask = dropout_mask(seed, dy.shape[0], lora_A.shape[1], dropout_p, dtype) if masked else None

    def into_h(dz: Tensor) -> Tensor:
        """s times the gradient of h, [M, R]: what reaches x_lora through A, and A through x_lora."""
        g = _gated(dz @ B, variant)
        return (g if dh is None else g + dh).mul_(scaling)

    grads = {}
    if needs.x or needs.x_lora:
        low = into_h(dz) @ A if mask is None else (into_h(dz) @ A).mul_(mask)
        if variant.x_lora is None:
            grads["x"] = low.addmm_(dz, weight)
        else:
            grads = {"x": dz @ weight if needs.x else None, "x_lora": low if needs.x_lora else None}
    if needs.weight:
        grads["weight"] = dz.t() @ x
    dzc = dz if variant.grad_row_scale is None else (dz * variant.grad_row_scale).to(dtype)  # for dA and dB only
    if needs.lora_A:
        grads["lora_A"] = (into_h(dzc).t() @ _lora_input(x, variant, mask)).to(lora_A.dtype)
    if needs.lora_B:
        grads["lora_B"] = (dzc.t() @ _low(h, scaling, variant)).to(lora_B.dtype)
    if needs.bias:
        grads["bias"] = dy.sum(0)
    if needs.h_in:
        grads["h_in"] = (scaling * _gated(dz @ B, variant)).to(variant.h_in.dtype)
    if needs.gate:
        per_rank = (dz @ B) * _ungated(h, scaling, variant)
        grads["gate"] = (
            per_rank.view(*variant.gate.shape, len(lora_A) // variant.gate.shape[1]).sum(-1).to(variant.gate.dtype)
        )
    if needs.out_scale:
        grads["out_scale"] = out_scale_gradient(dy, y, x, weight, B, h, bias, scaling, variant)
    return Gradients(**grads)


def backward_of_h(dh, x, lora_A, scaling, dropout_p, seed, needs, variant) -> Gradients:
    """The gradients where of `forward`'s results only h was used, which zeros for dy would fill with NaN where weight
    or lora_B holds an infinity; for autograd to differentiate once more. Arguments as in `backward`.
    """
    dh, mask = scaling * dh, None
    if seed is not None:
        mask = dropout_mask(seed, dh.shape[0], lora_A.shape[1], dropout_p, dh.dtype)
    low = dA = None
    with without_autocast(dh):
        if needs.x_lora or (needs.x and variant.x_lora is None):
            low = dh @ lora_A.to(dh.dtype)
            low = low if mask is None else low * mask
        if needs.lora_A:
            dA = (dh.t() @ _lora_input(x, variant, mask)).to(lora_A.dtype)
    return Gradients(lora_A=dA, x=low) if variant.x_lora is None else Gradients(lora_A=dA, x_lora=low)


def out_scale_gradient(dy, y, x, weight, lora_B, h, bias, scaling, variant) -> Tensor:
    """The gradient of out_scale, sum_M dy * z, from y = out_scale * z + bias, which is there, instead of from z: a base
    product, a third of a training step, is not computed again.

    But for the columns of which y tells too little: those whose bias is larger than the rest, in its root mean square,
    so that most of y's digits are the bias's, and those where the rest is below the smallest normal number of its
    dtype, or zero, for out_scale is. Their z is computed again. Which ones they are is read on the host; not while a
    CUDA graph is captured, where all are computed, as they are of meta tensors.

    Args: as in `backward`.
    Returns: [N] in out_scale's dtype.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    scaled = y.to(wide) if bias is None else y.to(wide) - bias
    sums, squares = (dy * scaled).sum(0), scaled.square().sum(0)
    smallest = 2 * torch.finfo(dy.dtype).tiny
    least = torch.full_like(squares, smallest) if bias is None else bias.to(squares.dtype).abs().clamp(min=smallest)
    lost = squares <= least.square() * dy.shape[0]
    if dy.is_meta or (dy.is_cuda and torch.cuda.is_current_stream_capturing()):
        lost = torch.arange(dy.shape[1], device=dy.device)
    else:
        lost = lost.nonzero().flatten()
    grad = (sums / variant.out_scale).to(variant.out_scale.dtype)
    return grad if lost.numel() == 0 else out_scale_columns(grad, lost, dy, x, weight, lora_B, h, scaling, variant)


def out_scale_columns(grad, lost, dy, x, weight, lora_B, h, scaling, variant) -> Tensor:
    """grad [N] of out_scale with the columns `lost`, which are int64 [n], from their z."""
    wide, B = torch.promote_types(dy.dtype, torch.float32), lora_B[lost].to(dy.dtype)
    z = torch.addmm(F.linear(x, weight[lost]), _low(h, scaling, variant), B.t())
    again = (dy.index_select(1, lost) * z.to(wide)).sum(0)
    return grad.index_copy(0, lost, again.to(grad.dtype))


def composition(x, weight, lora_A, lora_B, bias, scaling, mask, variant=PLAIN) -> tuple[Tensor, Tensor]:
    """(y, h) as PyTorch's autograd differentiates them, x and the optional tensors with any leading dimensions.

    For who must see plain PyTorch operators: torch.func transforms and vmap, torch.jit.trace, and tensor subclasses
    with rules of their own (DTensor, jagged and quantised tensors). h is x_lora At, without the scaling; mask is
    dropout's, of x's shape, or None.
    """
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    h = F.linear(_lora_input(x, variant, mask), A)
    low = h if variant.h_in is None else h + variant.h_in
    if variant.gate is not None:
        low = low * variant.gate.to(x.dtype).repeat_interleave(low.shape[-1] // variant.gate.shape[-1], dim=-1)
    if variant.out_scale is None:
        return F.linear(x, weight, bias) + scaling * F.linear(low, B), h
    y = ((F.linear(x, weight) + scaling * F.linear(low, B)) * variant.out_scale).to(x.dtype)
    return (y if bias is None else y + bias), h


def update(y, x, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """y [M, N] + s * drop(x) At Bt in a tensor of its own, and h = s * drop(x) At [M, R]; the dtype of all is x's."""
    mask = None if seed is None else dropout_mask(seed, x.shape[0], x.shape[1], dropout_p, x.dtype)
    h = (_lora_input(x, PLAIN, mask) @ lora_A.to(x.dtype).t()).mul_(scaling)
    return torch.addmm(y, h, lora_B.to(x.dtype).t()), h


def update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs) -> Gradients:
    """The gradients of `update` that `needs` asks for: dx is the low-rank path's alone, and y's is dy."""
    low = needs._replace(x=False, x_lora=needs.x)
    variant = Variant(x_lora=dy if x is None else x)  # x is None where no needed gradient reads it
    given = lora_A, lora_B, h, None, None, scaling, dropout_p, seed
    grads = backward(dy, None, None, None, *given, low, variant)
    return grads._replace(x=grads.x_lora, x_lora=None)


def update_composition(y, x, lora_A, lora_B, scaling, mask) -> Tensor:
    """`update` as PyTorch's autograd differentiates it, y and x with any leading dimensions; see `composition`."""
    low = F.linear(_lora_input(x, PLAIN, mask), lora_A.to(x.dtype))
    return y + scaling * F.linear(low, lora_B.to(x.dtype))
