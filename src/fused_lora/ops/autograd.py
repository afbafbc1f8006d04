"""The autograd Functions over the two operators: what is saved for the backward, and nothing more."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

import fused_lora.ops.schema  # noqa: F401  registers torch.ops.fused_lora

_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN, _NO_VARIANT = (None,) * 5, (False,) * 4
_unsafe_view = torch.ops.aten._unsafe_view.default
_dispatch_modes, _functorch_active = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


def matrix(t: Tensor) -> Tensor:
    """[..., n] as [M, n]."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


class LoRALinearFunction(torch.autograd.Function):
    """y [..., N], h [M, R] = the op on x [..., K]. Saves x and h, each only if a needed gradient uses it, never a mask
    or a copy of x.

    settings is (scaling, dropout_p, backend); variant is empty for plain LoRA, else (x_lora, h_in, gate, out_scale,
    grad_row_scale), 2-D. Flattening happens in here, where it makes no autograd nodes.
    """

    @staticmethod
    def forward(x, weight, lora_A, lora_B, bias, seed, settings, *variant):
        scaling, dropout_p, backend = settings
        tensors = (variant or _PLAIN)[:4]
        y, h = torch.ops.fused_lora.forward(
            matrix(x), weight, lora_A, lora_B, bias, scaling, dropout_p, seed, *tensors, backend
        )
        # _unsafe_view as in F.linear: y is nobody's view, so models may add to it in place
        return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[1])), h

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, lora_A, lora_B, _, seed, ctx.settings, *variant = inputs
        need = ctx.needs_input_grad
        keep_x, keep_h = need[1] or need[2], need[3]
        if variant:
            keep_x = need[1] or need[10] or (need[2] and variant[0] is None)
            keep_h = need[3] or need[9] or need[10]
        ctx.save_for_backward(
            x if keep_x else None, weight, lora_A, lora_B, output[1] if keep_h else None, seed, *variant
        )
        ctx.lead = x.shape[:-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dh):
        if torch.is_grad_enabled() and not (is_dynamo_compiling() or _functorch_active()):
            return _op_once(ctx, dy, dh)
        x, weight, lora_A, lora_B, h, seed, *variant = ctx.saved_tensors
        scaling, dropout_p, backend = ctx.settings
        if dy is None:  # nothing of y was used
            if dh is None:
                return (None,) * (7 + len(variant))
            dy = dh.new_zeros((dh.shape[0], weight.shape[0]))
        need = ctx.needs_input_grad
        needs, tensors = [*need[:5], *(need[7:11] or _NO_VARIANT)], variant or _PLAIN
        x = x if x is None else matrix(x)
        found = iter(
            torch.ops.fused_lora.backward(
                matrix(dy), dh, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, *tensors, needs, backend
            )
        )
        grads = [next(found) if wanted else None for wanted in needs]
        if len(ctx.lead) != 1 and grads[0] is not None:
            grads[0] = grads[0].view(*ctx.lead, grads[0].shape[1])
        return (*grads[:5], None, None, *grads[5:], None) if variant else (*grads[:5], None, None)


class _EagerFunction(torch.autograd.Function):
    """LoRALinearFunction for plain LoRA over a frozen layer where nobody listens to the dispatcher: straight to the
    back end.

    After a GEMM has emptied the caches, each step on the way costs microseconds: the dispatcher and its Python bridge,
        a second output, a
    context set up apart, and every argument that autograd looks at. So `plan` carries what needs no gradient.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, plan):
        weight, bias, seed, scaling, dropout_p, backend = plan
        lead, flat = None, x
        if x.dim() != 2:
            lead, flat = x.shape[:-1], matrix(x)
            if x.is_contiguous():
                x = flat  # saved as it is needed; a copy is not held
        y, h = backend.forward(flat, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
        _, need_A, need_B, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, weight, lora_A, lora_B, h if need_B else None, seed)
        ctx.plan = scaling, dropout_p, backend, lead
        return y if lead is None else _unsafe_view(y, (*lead, y.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            return _eager_once(ctx, dy)
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        scaling, dropout_p, backend, lead = ctx.plan
        need_x, need_A, need_B, _ = ctx.needs_input_grad
        if lead is not None:
            dy, x = matrix(dy), x if x is None else matrix(x)
        needs = (need_x, need_A, need_B, False)
        dx, dA, dB, _ = backend.backward(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs)
        if lead is not None and need_x:
            dx = dx.view(*lead, dx.shape[1])
        return dx, dA, dB, None


# With create_graph=True: differentiating once more must raise, not give zeros.
_op_once, _eager_once = (
    torch.autograd.function.once_differentiable(f.backward) for f in (LoRALinearFunction, _EagerFunction)
)
# Function.apply binds its arguments through inspect.signature on every call; its own C++ base does the rest of its
# work.
eager_apply = super(torch.autograd.Function, _EagerFunction).apply


def nobody_listens(x: Tensor, weight: Tensor, lora_A: Tensor, bias: Tensor | None) -> bool:
    """Whether this is plain eager mode over a frozen layer: no tracing, torch.compile, torch.func, selective
    checkpointing or other dispatch mode, no tensor subclass. Otherwise calls go through torch.ops.fused_lora.*, which
    all of those see."""
    return (
        type(x) in _PLAIN_TENSORS
        and type(weight) in _PLAIN_TENSORS
        and type(lora_A) in _PLAIN_TENSORS
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not (is_dynamo_compiling() or _dispatch_modes() or _functorch_active())
    )
