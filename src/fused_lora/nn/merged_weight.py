"""The weight of a layer with adapters folded in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.bases import Base
from fused_lora.deepspeed_zero import is_split
from fused_lora.nn.base_linear import check_weight

COMPUTED = "computed (by a parametrization, weight_norm or pruning)"  # what is no Parameter


def check_values(what: str, t: Tensor) -> None:
    """Raises ValueError unless a tensor is plain memory that is here."""
    if type(t) is not nn.Parameter or t.is_meta or is_split(t):
        kind = f"{type(t).__module__}.{type(t).__qualname__}"
        kind = f"one that is {COMPUTED}" if type(t) is Tensor else kind
        got = "one on the meta device" if t.is_meta else "one that ZeRO-3 has split" if is_split(t) else kind
        raise ValueError(f"{what} must be a plain Parameter with values to be merged; got {got}")


class MergedUpdate(NamedTuple):
    """What one adapter does to the weight, seen as the matrix [first size, all others]: rows * (W + scaling * left
    right)."""

    left: Tensor  # [first size, R]
    right: Tensor  # [R, all others]
    scaling: float
    rows: Tensor | None  # DoRA's m / n, [N, 1] or, where the weight lies transposed, [1, N]


@torch.no_grad()
def folded(matrix: Tensor, updates: Sequence[MergedUpdate]) -> Tensor:
    """The matrix with one update after the other folded in, in its own dtype."""
    for left, right, scaling, rows in updates:
        matrix = torch.addmm(matrix, left.to(matrix.dtype), right.to(matrix.dtype), alpha=scaling)
        matrix = matrix if rows is None else matrix.mul_(rows)
    return matrix


@torch.no_grad()
def merged_weight(weight: Tensor, updates: Sequence[MergedUpdate], names: Sequence[str]) -> Tensor:
    """The weight with every update folded in, computed in fp32 at least and rounded once.

    Equivalent to ``(rows * (weight.float() + scaling * left.float() @ right.float())).to(weight.dtype)``.

    Args:
        weight: a plain Parameter, as `check_values` wants it; seen as the matrix [first size, all others].
        updates: of the adapters, in their order.
        names: the adapters', for messages.
    Returns: weight's shape and dtype.
    Raises: ValueError if the weight is not whole, or the result is not finite.
    """
    matrix = updates[0].left.shape[0], updates[0].right.shape[1]
    check_weight(weight, tuple(weight.shape) if weight.dim() > 2 else matrix)
    compute = torch.promote_types(weight.dtype, torch.float32)
    merged = folded(weight.flatten(1).to(compute), updates)
    merged = merged.view(weight.shape).to(weight.dtype)
    if not torch.isfinite(merged).all():
        bad = merged.numel() - int(torch.isfinite(merged).sum())
        raise ValueError(
            f"the weight merged with adapter {', '.join(map(repr, names))} must be finite in {merged.dtype}; got {bad} "
            "elements that are not"
        )
    return merged


@torch.no_grad()
def summed(base: Base, updates: Sequence[MergedUpdate]) -> Tensor:
    """What the updates change in a quantised weight [N, K], in fp32."""
    if all(update.rows is None for update in updates):
        (N, _), (_, K) = updates[0].left.shape, updates[0].right.shape
        return folded(updates[0].left.new_zeros(N, K, dtype=torch.float32), updates)
    dense = base.dense(torch.float32)
    return folded(dense, updates) - dense
