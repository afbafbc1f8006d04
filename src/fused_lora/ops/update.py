"""lora_update(): the low-rank half of the op alone, over a y that somebody else's product has made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from fused_lora.ops.again import update_backward_again
from fused_lora.ops.autocast import cast_inputs
from fused_lora.ops.autograd import matrix, needs_plain_operators
from fused_lora.ops.checks import update_fault
from fused_lora.ops.internals import function_apply, reshaped, wants_operators
from fused_lora.ops.linear import draw_seed, tensor_scaling
from fused_lora.ops.reference import Gradients, update_backward, update_composition


def lora_update(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A LoRA update on the result of somebody else's linear layer: y + scaling * dropout(x) At Bt.

    Equivalent to::

        y + scaling * F.linear(F.linear(F.dropout(x, dropout_p, training), lora_A), lora_B)

    in y's dtype and in a tensor of its own: y stays as it is, since whoever made it may have kept it. For layers whose
    base product is not ours: a quantised library's, a sharded or a hooked module's. Differentiable in every tensor,
    its gradients once more. Products accumulate in fp32; h = scaling * dropout(x) At is rounded to x's dtype.

    Args:
        y: [..., N], a floating dtype; where it is not x's, the update is computed in x's dtype and added in the wider
            one.
        x: [..., K] with y's leading dimensions, bf16, fp16 or fp32 (fp64 on the reference back end), any strides, zero
            rows allowed. Under autocast it is cast as `torch.nn.Linear` casts it.
        lora_A, lora_B: [R, K] and [N, R], both in x's dtype or both fp32.
        scaling: lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)); a float or a 0-d tensor.
        dropout_p, training: as in `lora_linear`.
        backend: as in `lora_linear`; the compiled CUDA kernels have none for the update alone, "auto" takes Triton's.
    Returns: [..., N] in y's dtype.
    Raises: ValueError naming the argument, what was expected and what was given.
    Source: Hu et al., arXiv 2106.09685; names as in Hugging Face PEFT.
    """
    x, (lora_A,), (lora_B,), _ = cast_inputs(x, [lora_A], [lora_B])
    error = update_fault(y, x, lora_A, lora_B, dropout_p, backend)
    if error is not None:
        raise error
    if type(scaling) is not float:
        lora_A, lora_B, scaling = tensor_scaling(lora_A, lora_B, scaling)
    dropout_p = dropout_p if training else 0.0
    if needs_plain_operators(y, x, lora_A, lora_B):
        if backend not in ("auto", "reference"):
            raise ValueError(
                "backend must be 'auto' or 'reference' under torch.func transforms, forward-mode derivatives, "
                f"torch.jit.trace or a tensor subclass; got {backend!r}"
            )
        mask = F.dropout(torch.ones_like(x), dropout_p) if dropout_p > 0.0 else None
        return update_composition(y, x, lora_A, lora_B, scaling, mask).to(y.dtype)
    into = y if y.dtype == x.dtype else torch.zeros_like(y, dtype=x.dtype)
    apply = _UpdateFunction.apply if is_dynamo_compiling() else _eager_apply
    updated, _ = apply(into, x, lora_A, lora_B, draw_seed(x, dropout_p), (scaling, dropout_p, backend))
    return updated if into is y else (y + updated).to(y.dtype)


def joined(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], scalings: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Several updates of the same x as one of scaling 1: A below one another, [sum of R, K], and scaled B side by side,
    [N, sum of R]; in fp32 at least, so that scaled B isn't rounded."""

    def exact(t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, torch.float32))

    scaled_Bs = [exact(lora_B) * scaling for lora_B, scaling in zip(lora_Bs, scalings, strict=True)]
    return torch.cat([exact(lora_A) for lora_A in lora_As]), torch.cat(scaled_Bs, dim=1)


class _UpdateFunction(torch.autograd.Function):
    """y + update [..., N] and h [M, R] by torch.ops.fused_lora; saves x and h, each only if a needed gradient uses it,
    and never y."""

    @staticmethod
    def forward(y, x, lora_A, lora_B, seed, settings):
        updated, h = torch.ops.fused_lora.update(matrix(y), matrix(x), lora_A, lora_B, *settings[:2], seed, settings[2])
        return updated if y.dim() == 2 else reshaped(updated, y.shape), h  # nobody's view

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, lora_A, lora_B, seed, settings = inputs
        _, _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if need_A else None, lora_A, lora_B, output[1] if need_B else None, seed)
        ctx.settings, ctx.lead = settings, x.shape[:-1]

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None, None, None
        need_y, *needs = ctx.needs_input_grad[:4]
        dx, dA, dB = _gradients(ctx, matrix(dy), needs) if any(needs) else (None, None, None)
        if dx is not None and len(ctx.lead) != 1:
            dx = dx.view(*ctx.lead, dx.shape[1])
        return dy if need_y else None, dx, dA, dB, None, None


_eager_apply = function_apply(_UpdateFunction)


def _gradients(ctx: Any, dy: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """dx [M, K], dA and dB of dy [M, N], None for those that are not needed."""
    x, lora_A, lora_B, h, seed = ctx.saved_tensors
    scaling, dropout_p, backend = ctx.settings
    x = None if x is None else matrix(x)
    if torch.is_grad_enabled() and not is_dynamo_compiling():  # create_graph=True
        return update_backward_again(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs)
    given = dy, x, lora_A, lora_B, h, scaling, dropout_p, seed
    if wants_operators(dy):
        grads = update_backward(*given, Gradients(x=needs[0], lora_A=needs[1], lora_B=needs[2]))
        return [grads.x, grads.lora_A, grads.lora_B]
    found = iter(torch.ops.fused_lora.update_backward(*given, needs, backend))
    return [next(found) if need else None for need in needs]
