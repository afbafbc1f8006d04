"""The autograd Function of the op: what is saved for the backward, and nothing more."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from fused_lora.ops import reference, schema  # schema registers torch.ops.fused_lora
from fused_lora.ops.again import backward_again
from fused_lora.ops.internals import (
    PLAIN_TENSORS,
    dispatch_modes_active,
    forward_ad_active,
    function_apply,
    is_tracing,
    reshaped,
    transforms_active,
    wants_operators,
    without_autocast,
)
from fused_lora.ops.kept import keep_result
from fused_lora.ops.reference import Gradients, Variant, backward_of_h


class Inputs(NamedTuple):
    """What LoRALinearFunction takes, or an entry for each: whether its gradient is needed, or the gradient."""

    x: Any = None
    weight: Any = None
    lora_A: Any = None
    lora_B: Any = None
    bias: Any = None
    x_lora: Any = None
    h_in: Any = None
    gate: Any = None
    out_scale: Any = None
    grad_row_scale: Any = None
    seed: Any = None
    settings: Any = None  # (scaling, dropout_p, backend)

    def variant(self) -> Variant:
        """The entries of the optional tensors."""
        return Variant(self.x_lora, self.h_in, self.gate, self.out_scale, self.grad_row_scale)

    def differentiable(self) -> Gradients:
        """The entries of what may have a gradient."""
        return Gradients(
            self.x, self.weight, self.lora_A, self.lora_B, self.bias, self.x_lora, self.h_in, self.gate, self.out_scale
        )


def matrix(t: Tensor) -> Tensor:
    """[..., n] as [M, n]."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


class LoRALinearFunction(torch.autograd.Function):
    """y [..., N], h [M, R] = the op on `Inputs` with x [..., K] and 2-D optional tensors, by torch.ops.fused_lora.

    Saves x and h, each only if a needed gradient uses it, never a mask or a copy of x; and y for out_scale's gradient,
    computed again where it was changed in place meanwhile. Flattening happens in here, where it makes no autograd
    nodes.
    """

    # Every parameter is named: torch.compile counts them to learn, without gradients, that the first is no ctx.
    @staticmethod
    def forward(
        x, weight, lora_A, lora_B, bias, x_lora, h_in, gate, out_scale, grad_row_scale, seed, settings
    ) -> tuple[Tensor, Tensor]:
        scaling, dropout_p, backend = settings
        variant = x_lora, h_in, gate, out_scale, grad_row_scale
        run = schema.forward if _unheard(x, weight, lora_A, lora_B, bias, *variant) else torch.ops.fused_lora.forward
        y, h = run(matrix(x), weight, lora_A, lora_B, bias, scaling, dropout_p, seed, *variant, backend)
        # nobody's view, so that models may add to it in place
        return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], y.shape[1])), h

    @staticmethod
    def setup_context(ctx, inputs, output):
        given, need = Inputs(*inputs), Inputs(*ctx.needs_input_grad)
        keep_x = need.weight or need.out_scale or (need.lora_A and given.x_lora is None)
        keep_h = output[1] if need.lora_B or need.gate or need.out_scale else None
        y, changed = keep_result(output[0]) if need.out_scale else (None, None)
        keep_y = y, given.bias if need.out_scale else None
        factors = given.weight, given.lora_A, given.lora_B
        ctx.save_for_backward(given.x if keep_x else None, *factors, keep_h, *keep_y, given.seed, *given.variant())
        ctx.settings, ctx.lead, ctx.changed = given.settings, given.x.shape[:-1], changed
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dh):
        x, weight, lora_A, lora_B, h, y, bias, seed, *variant = ctx.saved_tensors
        scaling, dropout_p, backend = ctx.settings
        if dy is None and dh is None:
            return tuple(Inputs())
        x, y = x if x is None else matrix(x), y if y is None else matrix(y)
        needs = Inputs(*ctx.needs_input_grad).differentiable()
        factors = x, weight, lora_A, lora_B
        dy = dy if dy is None else matrix(dy)
        if dy is not None and ctx.changed is not None and ctx.changed():
            with torch.no_grad(), without_autocast(dy):
                y, _ = schema.forward(*factors, bias, scaling, dropout_p, seed, *variant, backend)
        given = (*factors, h, y, bias, scaling, dropout_p, seed)
        if dy is None:  # nothing of y was used
            grads = backward_of_h(dh, x, lora_A, scaling, dropout_p, seed, needs, Variant(*variant))
        elif torch.is_grad_enabled() and not is_dynamo_compiling():  # create_graph=True
            grads = backward_again(dy, dh, *factors, h, scaling, dropout_p, seed, needs, Variant(*variant))
        elif wants_operators(dy, dh):
            grads = reference.backward(dy, dh, *given, needs, Variant(*variant))
        else:
            run = schema.backward if _unheard(dy, dh, *factors, *variant) else torch.ops.fused_lora.backward
            found = iter(run(dy, dh, *given, *variant, list(needs), backend))
            grads = Gradients(*(next(found) if need else None for need in needs))
        if len(ctx.lead) != 1 and grads.x is not None:
            grads = grads._replace(x=grads.x.view(*ctx.lead, grads.x.shape[1]))
        return tuple(Inputs(*grads))  # torch.compile takes a named tuple for no gradients at all


def _unheard(*tensors: Tensor | None) -> bool:
    """Whether nobody would see an operator called on these: its implementation is called without the dispatcher, for
    20 to 50 us less a step."""
    if is_dynamo_compiling() or dispatch_modes_active():
        return False
    return all(t is None or type(t) in PLAIN_TENSORS for t in tensors)


_linear_apply = function_apply(LoRALinearFunction)


def linear_apply(*inputs: Any) -> tuple[Tensor, Tensor]:
    """LoRALinearFunction's y and h."""
    return LoRALinearFunction.apply(*inputs) if is_dynamo_compiling() else _linear_apply(*inputs)


def plain_eager(*tensors: Tensor | None) -> bool:
    """Whether this is plain eager mode on plain tensors: no tracing, torch.compile, torch.func, forward-mode
    derivatives, selective checkpointing or other dispatch mode, no tensor subclass, none that stands for zeros."""
    if not _unheard(*tensors) or transforms_active() or is_tracing():
        return False
    return not any(t is not None and t._is_zerotensor() for t in tensors)


def nobody_listens(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, *optional: Tensor
) -> bool:
    """Whether this is plain eager mode over a frozen layer. Otherwise calls go through torch.ops.fused_lora.*, which
    all who listen see."""
    return (
        plain_eager(x, weight, lora_A, lora_B, bias, *optional)
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )


def needs_plain_operators(*tensors: Tensor) -> bool:
    """Whether the caller must see PyTorch's own operators: torch.export (and with it ONNX), whose programs run without
    this library, torch.func transforms and vmap, forward-mode derivatives, torch.jit.trace, and tensor subclasses that
    are made of other tensors (DTensor, jagged, quantised), whose rules know those only."""
    if is_exporting() or forward_ad_active():
        return True
    if any(hasattr(type(t), "__tensor_flatten__") for t in tensors if type(t) not in PLAIN_TENSORS):
        return True
    if transforms_active():  # in a graph that torch.compile makes, too
        return True
    return not is_dynamo_compiling() and (is_tracing() or wants_operators(*tensors))
