"""The two operators of the library: schemas, fakes and their one implementation, which hands over to the back end that
`pick` names.

PyTorch's dispatcher is the only registry. Callers go through `torch.ops.fused_lora.*`, which torch.compile, export and
selective
checkpointing see as one node. Fixed arity: `backward` returns one tensor per true entry of `needs`, in the order of
    `reference.Gradients`.
"""

import torch

from fused_lora.backends import check_variant, pick
from fused_lora.ops import reference
from fused_lora.ops.reference import Gradients, Variant

_VARIANT = "Tensor? x_lora, Tensor? h_in, Tensor? gate, Tensor? out_scale"

_lib = torch.library.Library("fused_lora", "DEF")
_lib.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, float dropout_p, "
    "Tensor? seed, "
    f"{_VARIANT}, str backend) -> (Tensor y, Tensor h)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "backward(Tensor dy, Tensor? dh, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? h, float scaling, "
    "float dropout_p, "
    f"Tensor? seed, {_VARIANT}, Tensor? grad_row_scale, bool[] needs, str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, x_lora, h_in, gate, out_scale, backend):
    if x_lora is None and h_in is None and gate is None and out_scale is None:
        return pick(backend, x, weight, lora_A).forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    check_variant(backend)
    return reference.forward(
        x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, Variant(x_lora, h_in, gate, out_scale)
    )


def backward(
    dy,
    dh,
    x,
    weight,
    lora_A,
    lora_B,
    h,
    scaling,
    dropout_p,
    seed,
    x_lora,
    h_in,
    gate,
    out_scale,
    grad_row_scale,
    needs,
    backend,
):
    needs = Gradients(*needs)
    variant = Variant(x_lora, h_in, gate, out_scale, grad_row_scale)
    if dh is None and not needs.weight and all(t is None for t in variant):
        wanted = (needs.x, needs.lora_A, needs.lora_B, needs.bias)
        grads = pick(backend, dy, weight, lora_A).backward(
            dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, wanted
        )
    else:
        check_variant(backend)
        grads = reference.backward(dy, dh, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, variant)
    return [grad for grad in grads if grad is not None]


_lib.impl("forward", forward, "CompositeExplicitAutograd")
_lib.impl("backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_lora::forward")
def _forward_fake(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, x_lora, h_in, gate, out_scale, backend):
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0]))


@torch.library.register_fake("fused_lora::backward")
def _backward_fake(
    dy,
    dh,
    x,
    weight,
    lora_A,
    lora_B,
    h,
    scaling,
    dropout_p,
    seed,
    x_lora,
    h_in,
    gate,
    out_scale,
    grad_row_scale,
    needs,
    backend,
):
    M, K = dy.shape[0], lora_A.shape[1]
    like = Gradients(
        x=lambda: dy.new_empty((M, K)),
        weight=lambda: torch.empty_like(weight),
        lora_A=lambda: torch.empty_like(lora_A, memory_format=torch.contiguous_format),
        lora_B=lambda: torch.empty_like(lora_B, memory_format=torch.contiguous_format),
        bias=lambda: dy.new_empty((dy.shape[1],)),
        x_lora=lambda: dy.new_empty((M, K)),
        h_in=lambda: torch.empty_like(h_in, memory_format=torch.contiguous_format),
        gate=lambda: torch.empty_like(gate, memory_format=torch.contiguous_format),
        out_scale=lambda: torch.empty_like(out_scale, memory_format=torch.contiguous_format),
    )
    return [make() for make, need in zip(like, needs) if need]
