"""Second derivatives: what a backward computes, by PyTorch's operators, for autograd to differentiate once more."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops.dropout import dropout_mask
from fused_lora.ops.reference import PLAIN, Gradients, Variant, composition, update_composition


def gradients_again(outputs: Callable[..., Any], given: Sequence[Any], needs: Sequence[bool], incoming) -> list[Any]:
    """The gradients of the inputs that `needs` asks for, computed so that autograd can differentiate them once more.

    Args:
        outputs: a composition of PyTorch's operators: tensors of the inputs.
        given: the inputs, as autograd saved them: tensors or None.
        needs: which gradients are wanted.
        incoming: the gradient of each output, or None where it was not used.
    """
    # Views, so that an input which another one was computed from gets no share of that one's gradient.
    inputs: list[Any] = [
        t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in given
    ]
    wanted = [t for t, need in zip(inputs, needs) if need]
    used, grads = zip(*((out, grad) for out, grad in zip(outputs(*inputs), incoming) if grad is not None))
    found = iter(torch.autograd.grad(used, wanted, grads, create_graph=True))
    return [next(found) if need else None for need in needs]


def _in_place_of_x(h: Tensor, lora_A: Tensor, scaling: float, need_x: bool) -> tuple[Tensor, Tensor]:
    """An x and an A of the same h, where A is frozen and x was not kept: h itself and the identity. Raises:
    RuntimeError if the gradient of x is wanted, through which more is differentiated."""
    if need_x:
        raise RuntimeError("differentiating twice needs x, which is kept only where lora_A trains; lora_A is frozen")
    return h / scaling if scaling else h, torch.eye(len(lora_A), dtype=lora_A.dtype, device=lora_A.device)


def backward_again(dy, dh, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, variant=PLAIN) -> Gradients:
    """What `backward` computes, for autograd to differentiate once more.

    Raises: ValueError with grad_row_scale, which is no derivative of anything; RuntimeError where x is needed now and
        was not kept.
    """
    if variant.grad_row_scale is not None:
        raise ValueError("grad_row_scale must be None where gradients are differentiated; got a tensor")
    if x is None and variant.x_lora is None and (needs.lora_B or needs.gate):
        x, lora_A = _in_place_of_x(h, lora_A, scaling, needs.x)
        weight, seed = weight.new_zeros(weight.shape[0], len(lora_A)), None  # dropout is in h
    M, K = dy.shape[0], lora_A.shape[1]
    mask = None if seed is None else dropout_mask(seed, M, K, dropout_p, weight.dtype)
    x = weight.new_zeros(M, K) if x is None else x  # no needed gradient reads it
    given = (x, weight, lora_A, lora_B, weight.new_zeros(weight.shape[0]), *variant[:4])

    def outputs(x, weight, lora_A, lora_B, bias, *optional):
        return composition(x, weight, lora_A, lora_B, bias, scaling, mask, Variant(*optional))

    return Gradients(*gradients_again(outputs, given, needs, (dy, dh)))


def update_backward_again(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs) -> list:
    """What `update_backward` computes, dx, dA and dB, for autograd to differentiate once more.

    Raises: RuntimeError where x is needed now and was not kept.
    """
    if x is None and needs[2]:
        (x, lora_A), seed = _in_place_of_x(h, lora_A, scaling, needs[0]), None  # dropout is in h
    M, K = dy.shape[0], lora_A.shape[1]
    mask = None if seed is None else dropout_mask(seed, M, K, dropout_p, dy.dtype)
    x = dy.new_zeros(M, K) if x is None else x  # no needed gradient reads it

    def outputs(x, lora_A, lora_B):
        return (update_composition(torch.zeros_like(dy), x, lora_A, lora_B, scaling, mask),)

    return gradients_again(outputs, (x, lora_A, lora_B), needs, (dy,))
