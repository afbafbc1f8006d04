"""Several LoRA layers of the same x in one autograd Function: one buffer for dx, to which each adds its own, instead of
one a layer and their sum. On the CPU, where it was measured (bench/NOTES.md)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.backends import Serving, cpu
from fused_lora.ops.autograd import matrix
from fused_lora.ops.eager import unusual_backward
from fused_lora.ops.internals import any_autocast_enabled, forward_ad_active, function_apply, reshaped
from fused_lora.ops.linear import draw_seed, eager_serving
from fused_lora.ops.reference import PLAIN, Gradients


class Projection(NamedTuple):
    """One layer's arguments of `lora_linear` beside x."""

    weight: Tensor  # [N, K]
    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    scaling: Any
    bias: Tensor | None  # [N]
    dropout_p: float  # 0 outside training


class _Call(NamedTuple):
    """What the Function needs of one layer beside tensors with gradients."""

    weight: Tensor
    bias: Tensor | None
    seed: Tensor | None
    scaling: float
    dropout_p: float
    serving: Serving


def lora_projections(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...] | None:
    """`lora_linear` of one x for several layers, y [..., N] of each; None where there is nothing to gain or to lose:
    outside training, off the CPU, in another dtype than fp32, under autocast and where anything listens to the
    dispatcher (torch.compile, torch.func, selective checkpointing).

    Dropout's masks are drawn in the order of the layers, as calls one after the other draw them.

    Args:
        x: [..., K].
        projections: the layers.
    Raises: ValueError as `lora_linear`.
    """
    if (
        not (torch.is_grad_enabled() and x.is_cpu and x.dtype is torch.float32)
        or any_autocast_enabled()
        or forward_ad_active()
    ):
        return None
    servings = []
    for p in projections:
        if type(p.scaling) is not float:
            return None
        serving = eager_serving(x, p.weight, p.lora_A, p.lora_B, p.bias, p.dropout_p, "auto")
        if serving is None or serving.backend is not cpu:
            return None
        servings.append(serving)
    factors = [factor for p in projections for factor in (p.lora_A, p.lora_B)]
    if not (x.requires_grad or any(factor.requires_grad for factor in factors)):
        return None
    calls = [
        _Call(p.weight, p.bias, draw_seed(x, p.dropout_p) if p.dropout_p else None, p.scaling, p.dropout_p, serving)
        for p, serving in zip(projections, servings)
    ]
    return _apply(x, calls, *factors)


_NONE = Gradients(*[False] * len(Gradients._fields))


class _Projections(torch.autograd.Function):
    """The layers' y of x [..., K], `calls` and A, B of each; saves x once."""

    @staticmethod
    def forward(ctx, x, calls, *factors):
        flat, kept, ys = matrix(x), [], []
        needs = ctx.needs_input_grad[2:]
        for n, (weight, bias, seed, scaling, dropout_p, (back_end, plan)) in enumerate(calls):
            given = flat, weight, *factors[2 * n : 2 * n + 2], bias, scaling, dropout_p, seed
            y, h = back_end.forward(*given, PLAIN, plan)
            ys.append(y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], y.shape[1])))
            kept += [weight, *factors[2 * n : 2 * n + 2], h if needs[2 * n + 1] else None, seed]
        ctx.save_for_backward(x if any(needs[::2]) else None, *kept)
        ctx.set_materialize_grads(False)
        ctx.calls = [(call.scaling, call.dropout_p, call.serving) for call in calls]
        ctx.shape = x.shape
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x, *kept = ctx.saved_tensors
        x = None if x is None else matrix(x)
        need_x, _, *needs = ctx.needs_input_grad
        dx, dfactors = None, []
        for n, (dy, call) in enumerate(zip(dys, ctx.calls, strict=True)):
            if dy is None:  # nothing of this y was used
                dfactors += [None, None]
                continue
            wanted = _NONE._replace(x=need_x, lora_A=needs[2 * n], lora_B=needs[2 * n + 1])
            dx, dA, dB = _gradients(matrix(dy), dx, x, kept[5 * n : 5 * n + 5], call, wanted)
            dfactors += [dA, dB]
        return None if dx is None else dx.reshape(ctx.shape), None, *dfactors


_apply = function_apply(_Projections)


def _gradients(dy, dx, x, kept, call, needs) -> tuple:
    """dx, with one layer's added to it, dA and dB."""
    (weight, lora_A, lora_B, h, seed), (scaling, dropout_p, serving) = kept, call
    given = dy, None, x, weight, lora_A, lora_B, h, None, None, scaling, dropout_p, seed
    grads = unusual_backward(given, needs, PLAIN, serving)
    if grads is None and dx is not None:
        factors = weight, lora_A, lora_B
        grads = cpu.backward_onto(dx, dy, x, *factors, h, scaling, dropout_p, seed, needs, serving.plan)
        return dx, grads.lora_A, grads.lora_B
    if grads is None:
        grads = cpu.backward(*given, needs, PLAIN, serving.plan)
    total = grads.x if dx is None or grads.x is None else dx + grads.x
    return total, grads.lora_A, grads.lora_B
