"""The operators of `grouped_lora_update`, beside those of `schema`: schemas, fakes, FLOPs and their implementation.

A backward returns one tensor per true entry of `needs`, in the order of x, the factors A, the factors B.
"""

import torch
from torch import Tensor

from fused_lora.backends import GROUPED, Request, bucket, pick
from fused_lora.ops.after_import import after_import
from fused_lora.ops.checks import segments_fault
from fused_lora.ops.grouped_reference import largest_rank, positions
from fused_lora.ops.internals import without_autocast

_GIVEN = "Tensor[] lora_A, Tensor[] lora_B"
_SEGMENTS = "Tensor scaling, Tensor offsets, Tensor? rows, float[] dropout_p, Tensor? seed"

_lib = torch.library.Library("fused_lora", "FRAGMENT")
_lib.define(
    f"grouped_update(Tensor y, Tensor x, {_GIVEN}, {_SEGMENTS}, str backend) -> (Tensor y, Tensor h)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    f"grouped_update_backward(Tensor dy, Tensor? x, {_GIVEN}, Tensor? h, {_SEGMENTS}, bool[] needs, str backend) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _back_end(backend: str, x: Tensor, lora_A: list[Tensor], lora_B: list[Tensor]):
    """Who serves a call, from x, or dy, and the factors."""
    M, N, K, R = bucket(x.shape[0]), lora_B[0].shape[-2], lora_A[0].shape[-1], largest_rank(lora_A)
    return pick(backend, Request(x.device, x.dtype, lora_A[0].dtype, M, N, K, R, True, GROUPED)).backend


def grouped_update(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, backend):
    if x.is_cpu:  # a look at a GPU's values would wait for it
        error = segments_fault(offsets, rows, x.shape[0])
        if error is not None:
            raise error
    back_end = _back_end(backend, x, lora_A, lora_B)
    return back_end.grouped_update(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed)


def grouped_update_backward(
    dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs, backend
) -> list[Tensor]:
    back_end = _back_end(backend, dy, lora_A, lora_B)
    with without_autocast(dy):
        grads = back_end.grouped_update_backward(
            dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs
        )
    return [grad for grad in grads if grad is not None]


_lib.impl("grouped_update", grouped_update, "CompositeExplicitAutograd")
_lib.impl("grouped_update_backward", grouped_update_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_lora::grouped_update")
def _fake(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, backend):
    return y.new_empty(y.shape), x.new_empty((positions(x, rows), largest_rank(lora_A)))


@torch.library.register_fake("fused_lora::grouped_update_backward")
def _backward_fake(dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs, backend):
    sizes = [(dy.shape[0], lora_A[0].shape[-1]), *(t.shape for t in (*lora_A, *lora_B))]
    return [like.new_empty(size) for like, size, need in zip((dy, *lora_A, *lora_B), sizes, needs) if need]


def _flops(y, x, lora_A, lora_B, scaling, offsets, rows, *_, **__) -> int:
    """Of h and the update, 2 M' R (K + N), as if every group had the largest rank: the values of offsets are not
    seen."""
    return 2 * (x if rows is None else rows)[0] * max(A[-2] for A in lora_A) * (x[1] + y[1])


def _backward_flops(dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs, *_, **__) -> int:
    """Of dh and the products that the needed gradients ask for, likewise."""
    (M, N), K, R = dy, lora_A[0][-1], max(A[-2] for A in lora_A)
    need_x, need_A, need_B = needs[0], any(needs[1 : 1 + len(lora_A)]), any(needs[1 + len(lora_A) :])
    widths = ((need_x or need_A, N), (need_x, K), (need_A, K), (need_B, N))
    return 2 * (M if rows is None else rows[0]) * R * sum(width for need, width in widths if need)


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.fused_lora.grouped_update)(_flops)
    register_flop_formula(torch.ops.fused_lora.grouped_update_backward)(_backward_flops)


after_import("torch.utils.flop_counter", _register_flops)
