"""lora_around(): a LoRA layer on a linear layer of any kind, by its dense view or by its own product."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fused_lora.bases.base import Base, of
from fused_lora.ops import reference
from fused_lora.ops.again import backward_again
from fused_lora.ops.autograd import matrix, needs_plain_operators
from fused_lora.ops.checks import fault
from fused_lora.ops.internals import forward_ad_active, reshaped, wants_operators, without_autocast
from fused_lora.ops.linear import draw_seed, lora_linear, tensor_scaling
from fused_lora.ops.reference import PLAIN, Gradients
from fused_lora.ops.update import lora_update


def lora_around(
    linear: nn.Module,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer of any kind with a LoRA update.

    Equivalent to::

        linear(x) + scaling * F.linear(F.linear(F.dropout(x, dropout_p, training), lora_A), lora_B)

    in the dtype of linear(x). A quantised weight that `of` knows is dequantised for `lora_linear`'s kernels, and again
    in the backward: it is never kept dense. The layer is called, and the update added to what it returns, where its own
    product is the faster one (few rows without a gradient for x), where it carries hooks or a forward of its own (or of
    a subclass), under torch.compile, and where its weight is of another kind.

    Args:
        linear: K inputs, N outputs, frozen but for its bias.
        x: [..., K], a dtype that `linear` takes.
        lora_A, lora_B: [R, K] and [N, R], of one dtype; where that is neither fp32 nor the one that `linear` computes
            in, the update is computed in it, as PEFT does.
        scaling, dropout_p, training: as in `lora_linear`.
    Returns: [..., N].
    Raises: ValueError naming the argument, what was expected and what was given.
    """
    base = of(linear)
    dropout_p = dropout_p if training else 0.0
    cast = x if base is None else x.to(base.compute_dtype(x))
    if base is None or lora_A.dtype not in (cast.dtype, torch.float32) or not _dense_serves(base, x):
        return added(linear(x), cast, lora_A, lora_B, scaling, dropout_p)
    with without_autocast(x):
        y = _over_dense(base, cast, lora_A, lora_B, scaling, dropout_p)
    return y.to(x.dtype) if base.returns_input_dtype else y


def added(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, dropout_p: float) -> Tensor:
    """`lora_update` for whatever a layer was called with: x goes to the adapter's device and, where the adapter has
    neither its dtype nor fp32, into the adapter's dtype, as in PEFT."""
    dtype = x.dtype if lora_A.dtype is torch.float32 else lora_A.dtype
    return lora_update(y, x.to(lora_A.device, dtype), lora_A, lora_B, scaling, dropout_p=dropout_p)


def _dense_serves(base: Base, x: Tensor) -> bool:
    """Whether the dense view serves a call."""
    if is_dynamo_compiling() or not base.untouched():
        return False
    if forward_ad_active() or (torch.is_grad_enabled() and x.requires_grad):
        return True
    return not base.product_serves(x.numel() // max(x.shape[-1], 1))


def _over_dense(base: Base, x, lora_A, lora_B, scaling, dropout_p) -> Any:
    bias = base.linear.bias
    bias = None if bias is None else bias.to(x.dtype)
    if needs_plain_operators(x, lora_A, lora_B):
        return lora_linear(x, base.dense(x.dtype), lora_A, lora_B, scaling, bias=bias, dropout_p=dropout_p)
    if type(scaling) is not float:
        lora_A, lora_B, scaling = tensor_scaling(lora_A, lora_B, scaling)
    return _OverBase.apply(x, lora_A, lora_B, bias, (base, scaling, dropout_p))


class _OverBase(torch.autograd.Function):
    """y [..., N] by `lora_linear`'s kernels over a base's dense view, which lives as long as they run."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, call):
        base, scaling, dropout_p = call
        weight = base.dense(x.dtype)
        error = fault(x, weight, lora_A, lora_B, bias, dropout_p, "auto")
        if error is not None:
            raise error
        seed = draw_seed(x, dropout_p)
        factors = weight, lora_A, lora_B, bias, scaling, dropout_p, seed
        y, h = torch.ops.fused_lora.forward(matrix(x), *factors, *PLAIN, "auto")
        _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, lora_A, lora_B, h if need_B else None, seed)
        ctx.call, ctx.lead = call, x.shape[:-1]
        return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        dy = matrix(dy)
        need_x, need_A, need_B, need_bias, _ = ctx.needs_input_grad
        grads = _gradients(ctx, dy, Gradients(need_x, False, need_A, need_B, False, False, False, False, False))
        dx = grads.x if grads.x is None else grads.x.view(*ctx.lead, grads.x.shape[1])
        return dx, grads.lora_A, grads.lora_B, dy.sum(0) if need_bias else None, None


def _gradients(ctx: Any, dy: Tensor, needs: Gradients) -> Gradients:
    """dx, dA and dB of dy [M, N]; W is dequantised for dx alone."""
    x, lora_A, lora_B, h, seed = ctx.saved_tensors
    base, scaling, dropout_p = ctx.call
    x = None if x is None else matrix(x)
    settings = scaling, dropout_p, seed
    if torch.is_grad_enabled():  # create_graph=True
        return backward_again(dy, None, x, base.dense(dy.dtype), lora_A, lora_B, h, *settings, needs)
    if wants_operators(dy):
        return reference.backward(dy, None, x, base.dense(dy.dtype), lora_A, lora_B, h, None, None, *settings, needs)
    if needs.x:
        given = dy, None, x, base.dense(dy.dtype), lora_A, lora_B, h, None, None, *settings, *PLAIN
        found = iter(torch.ops.fused_lora.backward(*given, list(needs), "auto"))
    else:
        wanted = [False, needs.lora_A, needs.lora_B]
        found = iter(torch.ops.fused_lora.update_backward(dy, x, lora_A, lora_B, h, *settings, wanted, "auto"))
    return Gradients(*(next(found) if need else None for need in needs))
