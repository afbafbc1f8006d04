"""The operators of the library: schemas, fakes, FLOPs and their one implementation, which hands over to the back
end that `pick` names.

`forward` and `backward` are `lora_linear`; `update` and `update_backward` are `lora_update`. PyTorch's dispatcher is
the only registry. Callers go through `torch.ops.fused_lora.*`, which torch.compile, export and selective checkpointing
see as one node. Fixed arity: a backward returns one tensor per true entry of `needs`, in the order of
`reference.Gradients`, or of (x, lora_A, lora_B).
"""

from typing import Any

import torch
from torch import Tensor

from fused_lora.backends import UPDATE, Request, bucket, pick
from fused_lora.ops.after_import import after_import
from fused_lora.ops.internals import without_autocast
from fused_lora.ops.reference import Gradients, Variant

_VARIANT = "Tensor? x_lora, Tensor? h_in, Tensor? gate, Tensor? out_scale, Tensor? grad_row_scale"

_lib = torch.library.Library("fused_lora", "DEF")
_lib.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, float dropout_p, "
    f"Tensor? seed, {_VARIANT}, str backend) -> (Tensor y, Tensor h)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "backward(Tensor dy, Tensor? dh, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? h, "
    f"Tensor? y, Tensor? bias, float scaling, float dropout_p, Tensor? seed, {_VARIANT}, bool[] needs, "
    "str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "update(Tensor y, Tensor x, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p, Tensor? seed, "
    "str backend) -> (Tensor y, Tensor h)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "update_backward(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? h, float scaling, float dropout_p, "
    "Tensor? seed, bool[] needs, str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def aligned(weight: Tensor) -> bool:
    """Whether the rows of the weight lie in one piece each, from addresses that are multiples of 16 bytes; a CPU has no
    need of those addresses."""
    if weight.stride(1) != 1:
        return False
    return weight.is_cpu or (weight.stride(0) * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0)


def request_of(x: Tensor, weight: Tensor, lora_A: Tensor, variant: Variant) -> Request:
    """The request that a call makes, from x [..., K] or dy [M, N] and the others."""
    optional = tuple(name for name, t in zip(Variant._fields, variant) if t is not None)
    (N, K), R = weight.shape, lora_A.shape[0]
    return Request(
        x.device, x.dtype, lora_A.dtype, bucket(x.numel() // x.shape[-1]), N, K, R, aligned(weight), optional
    )


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, *optional_and_backend):
    variant, backend = Variant(*optional_and_backend[:-1]), optional_and_backend[-1]
    back_end, plan = pick(backend, request_of(x, weight, lora_A, variant))
    return back_end.forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant, plan)


def backward(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, *optional_needs_backend):
    *optional, needs, backend = optional_needs_backend
    variant, needs = Variant(*optional), Gradients(*needs)
    back_end, plan = pick(backend, request_of(dy, weight, lora_A, variant))
    with without_autocast(dy):
        given = dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed
        grads = back_end.backward(*given, needs, variant, plan)
        if needs.weight and grads.weight is None:  # a product of its own, which no kernel of ours could better
            dz = dy if variant.out_scale is None else (dy * variant.out_scale).to(dy.dtype)
            grads = grads._replace(weight=dz.t() @ x)
    return [grad for grad in grads if grad is not None]


def update_request(x: Tensor, lora_A: Tensor, N: int) -> Request:
    """The request that a call of `lora_update` makes, from x [..., K], or dy [M, N], and the others."""
    R, K = lora_A.shape
    return Request(x.device, x.dtype, lora_A.dtype, bucket(x.numel() // x.shape[-1]), N, K, R, True, UPDATE)


def update(y, x, lora_A, lora_B, scaling, dropout_p, seed, backend):
    back_end, _ = pick(backend, update_request(x, lora_A, y.shape[1]))
    return back_end.update(y, x, lora_A, lora_B, scaling, dropout_p, seed)


def update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs, backend):
    back_end, _ = pick(backend, update_request(dy, lora_A, dy.shape[1]))
    wanted = Gradients(x=needs[0], lora_A=needs[1], lora_B=needs[2])
    with without_autocast(dy):
        grads = back_end.update_backward(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, wanted)
    return [grad for grad in (grads.x, grads.lora_A, grads.lora_B) if grad is not None]


_lib.impl("forward", forward, "CompositeExplicitAutograd")
_lib.impl("backward", backward, "CompositeExplicitAutograd")
_lib.impl("update", update, "CompositeExplicitAutograd")
_lib.impl("update_backward", update_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_lora::forward")
def _forward_fake(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, *optional_and_backend):
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0]))


@torch.library.register_fake("fused_lora::backward")
def _backward_fake(dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, *optional_needs_backend):
    *optional, needs, _ = optional_needs_backend
    variant, M, K = Variant(*optional), dy.shape[0], lora_A.shape[1]

    def like(t: Any) -> Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    made = Gradients(
        x=lambda: dy.new_empty((M, K)),
        weight=lambda: like(weight),
        lora_A=lambda: like(lora_A),
        lora_B=lambda: like(lora_B),
        bias=lambda: dy.new_empty((dy.shape[1],)),
        x_lora=lambda: dy.new_empty((M, K)),
        h_in=lambda: like(variant.h_in),
        gate=lambda: like(variant.gate),
        out_scale=lambda: like(variant.out_scale),
    )
    return [make() for make, need in zip(made, needs) if need]


@torch.library.register_fake("fused_lora::update")
def _update_fake(y, x, lora_A, lora_B, scaling, dropout_p, seed, backend):
    return y.new_empty(y.shape), x.new_empty((x.shape[0], lora_A.shape[0]))


@torch.library.register_fake("fused_lora::update_backward")
def _update_backward_fake(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs, backend):
    sizes = (dy.shape[0], lora_A.shape[1]), lora_A.shape, lora_B.shape
    return [like.new_empty(size) for like, size, need in zip((dy, lora_A, lora_B), sizes, needs) if need]


def _forward_flops(x, weight, lora_A, *_, **__) -> int:
    """Of the base product, h and the update: 2 M N K + 2 M R (K + N)."""
    (M, K), (N, R) = x, (weight[0], lora_A[0])
    return 2 * M * N * K + 2 * M * R * (K + N)


def _backward_flops(
    dy, dh, x, weight, lora_A, lora_B, h, y, bias, scaling, dropout_p, seed, *optional_needs_backend, **_
) -> int:
    """Of the products that the needed gradients ask for."""
    needs, (M, N), (R, K) = Gradients(*optional_needs_backend[-2]), dy, lora_A
    into_x, into_h = needs.x or needs.x_lora, needs.x or needs.x_lora or needs.lora_A or needs.h_in or needs.gate
    thin = [(into_h, N), (into_x, K), (needs.lora_A, K), (needs.lora_B, N)]
    base = int(needs.x) + int(needs.weight)
    return 2 * M * N * K * base + sum(2 * M * R * width for need, width in thin if need)


def _update_flops(y, x, lora_A, *_, **__) -> int:
    """Of h and the update: 2 M R (K + N)."""
    return 2 * x[0] * lora_A[0] * (x[1] + y[1])


def _update_backward_flops(dy, x, lora_A, lora_B, h, scaling, dropout_p, seed, needs, *_, **__) -> int:
    """Of dh and the products that the needed gradients ask for."""
    (M, N), (R, K) = dy, lora_A
    need_x, need_A, need_B = needs
    return (
        2 * M * R * sum(width for need, width in ((need_x or need_A, N), (need_x, K), (need_A, K), (need_B, N)) if need)
    )


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.fused_lora.forward)(_forward_flops)
    register_flop_formula(torch.ops.fused_lora.backward)(_backward_flops)
    register_flop_formula(torch.ops.fused_lora.update)(_update_flops)
    register_flop_formula(torch.ops.fused_lora.update_backward)(_update_backward_flops)


after_import("torch.utils.flop_counter", _register_flops)  # which imports Triton: only who counts pays
