"""The op where nobody listens to the dispatcher: Functions that go straight to a back end, which serves their backward,
too.

After a GEMM has emptied the caches, each step on the way costs microseconds: the dispatcher and its Python bridge, a
second output, a context set up apart, and every argument that autograd looks at. So `call` carries what needs no
gradient. `autograd` has the Function for everybody else.
"""

import functools

import torch

import fused_lora.ops.schema  # noqa: F401  registers torch.ops.fused_lora
from fused_lora.backends import Serving
from fused_lora.ops import reference
from fused_lora.ops.again import backward_again
from fused_lora.ops.autograd import matrix
from fused_lora.ops.internals import (
    PLAIN_TENSORS,
    any_autocast_enabled,
    dispatch_modes_active,
    function_apply,
    reshaped,
    wants_operators,
    without_autocast,
)
from fused_lora.ops.kept import keep_result
from fused_lora.ops.reference import PLAIN, Gradients, Variant, backward_of_h


def _seen_backward(given, needs: Gradients, variant: Variant, back_end, plan: str) -> Gradients:
    """The back end's backward as an operator, which dispatch modes see."""
    name = back_end.__name__.rpartition(".")[2]
    named = f"{name}:{plan}" if plan else name
    found = iter(torch.ops.fused_lora.backward(*given, *variant, list(needs), named))
    return Gradients(*(next(found) if need else None for need in needs))


def unusual_backward(given, needs: Gradients, variant: Variant, serving: Serving) -> Gradients | None:
    """The gradients of a call that went straight to the back end, where its backward cannot: gradients that are
    differentiated once more, batched ones, and who listens by now or casts. None where it can.

    Args:
        given: the arguments of a back end's backward up to seed.
    """
    dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed = given
    if torch.is_grad_enabled():  # create_graph=True
        return backward_again(dy, dh, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, variant)
    if wants_operators(dy, dh):
        factors = x, weight, lora_A, lora_B
        return reference.backward(dy, dh, *factors, h, y, bias, scaling, dropout_p, seed, needs, variant)
    # Who came up after the forward sees its backward, too; and a collective that is under way is waited for.
    plain = type(dy) in PLAIN_TENSORS and (dh is None or type(dh) in PLAIN_TENSORS)
    if dispatch_modes_active() or not plain:
        return _seen_backward(given, needs, variant, *serving)
    if any_autocast_enabled():
        with without_autocast(dy):
            return serving.backend.backward(*given, needs, variant, serving.plan)
    return None


@functools.cache
def _needs(of_inputs: tuple[bool, ...]) -> Gradients:
    """Which gradients _EagerFunction's needs_input_grad asks for."""
    x, lora_A, lora_B, _ = of_inputs
    return Gradients(x, False, lora_A, lora_B, False, False, False, False, False)


def without_gradients(x, lora_A, lora_B, call):
    """y [..., N] of plain LoRA over a frozen layer, past autograd's Function, which costs a tiny layer 1.8 of 11 us
    (EPYC 9005, 2026-11-27). Arguments as `eager_apply`'s."""
    weight, bias, seed, scaling, dropout_p, (back_end, plan) = call
    y, _ = back_end.forward(matrix(x), weight, lora_A, lora_B, bias, scaling, dropout_p, seed, PLAIN, plan)
    return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], y.shape[1]))


class _EagerFunction(torch.autograd.Function):
    """Plain LoRA over a frozen layer: y [..., N] by the back end and plan of `call`."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, call):
        weight, bias, seed, scaling, dropout_p, serving = call
        back_end, plan = serving
        lead, flat = None, x
        if x.dim() != 2:
            lead, flat = x.shape[:-1], matrix(x)
        y, h = back_end.forward(flat, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, PLAIN, plan)
        _, need_A, need_B, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, weight, lora_A, lora_B, h if need_B else None, seed)
        ctx.call = scaling, dropout_p, serving, lead
        return y if lead is None else reshaped(y, (*lead, y.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        scaling, dropout_p, serving, lead = ctx.call
        if lead is not None:
            N, K = weight.shape
            dy, x = dy.reshape(-1, N), x if x is None else x.reshape(-1, K)
        needs = _needs(ctx.needs_input_grad)
        given = (dy, None, x, weight, lora_A, lora_B, h, None, None, scaling, dropout_p, seed)
        grads = unusual_backward(given, needs, PLAIN, serving)
        if grads is None:
            grads = serving.backend.backward(*given, needs, PLAIN, serving.plan)
        dx = grads.x
        if lead is not None and dx is not None:
            dx = dx.view(*lead, dx.shape[1])
        return dx, grads.lora_A, grads.lora_B, None


@functools.cache
def _needs_of_variant(of_inputs: tuple[bool, ...]) -> Gradients:
    """Which gradients _EagerVariantFunction's needs_input_grad asks for."""
    x, lora_A, lora_B, *optional, _ = of_inputs
    return Gradients(x, False, lora_A, lora_B, False, *optional)


class _EagerVariantFunction(torch.autograd.Function):
    """_EagerFunction with optional tensors: y [..., N], or y and h [M, R] where the call returns h.

    They come as they were given, x_lora, h_in and gate with x's leading dimensions, and are flattened in here, and
    out_scale divided by out_norm, where it makes no autograd nodes.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, x_lora, h_in, gate, out_scale, call):
        weight, bias, grad_row_scale, out_norm, seed, scaling, dropout_p, serving, return_h, recorded = call
        back_end, plan = serving
        scale = out_scale if out_norm is None else out_scale / out_norm
        lead, flat, variant = None, x, Variant(x_lora, h_in, gate, scale, grad_row_scale)
        if x.dim() != 2:
            lead, flat = x.shape[:-1], matrix(x)
            variant = Variant(*[t if t is None or n > 2 else matrix(t) for n, t in enumerate(variant)])
        y, h = back_end.forward(flat, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan)
        y = y if lead is None else reshaped(y, (*lead, y.shape[1]))
        _, need_A, need_B, _, _, need_gate, need_scale, _ = ctx.needs_input_grad
        keep_x = need_scale or (need_A and x_lora is None)
        keep_h = need_B or need_gate or need_scale
        kept = x if keep_x else None, weight, lora_A, lora_B, h if keep_h else None
        saved_y, changed = keep_result(y) if need_scale and recorded else (None, None)
        kept_y = saved_y, bias if need_scale else None
        ctx.save_for_backward(*kept, *kept_y, seed, x_lora, h_in, gate, out_scale, grad_row_scale, out_norm)
        ctx.call = scaling, dropout_p, serving, lead, None if out_norm is None else scale, changed
        if not return_h:
            return y
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh=None):
        x, weight, lora_A, lora_B, h, y, bias, seed, x_lora, h_in, gate, *ends = ctx.saved_tensors
        out_scale, row_scale, out_norm = ends
        scaling, dropout_p, serving, lead, scale, changed = ctx.call
        if dy is None and dh is None:
            return (None,) * 8
        if lead is not None:
            dy, x, y = (t if t is None else matrix(t) for t in (dy, x, y))
            x_lora, h_in, gate = (t if t is None else matrix(t) for t in (x_lora, h_in, gate))
        if out_norm is None:
            scale = out_scale
        elif torch.is_grad_enabled():  # it is differentiated once more
            scale = out_scale / out_norm
        needs, variant = _needs_of_variant(ctx.needs_input_grad), Variant(x_lora, h_in, gate, scale, row_scale)
        if changed is not None and dy is not None and changed():
            again = x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant
            with torch.no_grad(), without_autocast(dy):
                y, _ = serving.backend.forward(*again, serving.plan)
        given = dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed
        grads: Gradients | None
        if dy is None:  # nothing of y was used
            grads = backward_of_h(dh, x, lora_A, scaling, dropout_p, seed, needs, variant)
        else:
            grads = unusual_backward(given, needs, variant, serving)
        if grads is None:
            grads = serving.backend.backward(*given, needs, variant, serving.plan)
        dx, _, dA, dB, _, *drows, dscale = grads
        if out_norm is not None and dscale is not None:
            dscale = dscale / out_norm
        if lead is not None:
            dx, *drows = (t if t is None else t.view(*lead, t.shape[1]) for t in (dx, *drows))
        return dx, dA, dB, *drows, dscale, None


eager_apply, eager_variant_apply = function_apply(_EagerFunction), function_apply(_EagerVariantFunction)
