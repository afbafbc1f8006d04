"""The weight of a layer with adapters folded in."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_lora.nn.base_linear import check_weight


def check_values(what: str, t: Tensor) -> None:
    """Raises ValueError unless a tensor is plain memory that is here."""
    if type(t) is not nn.Parameter or t.is_meta:
        got = "one on the meta device" if t.is_meta else f"{type(t).__module__}.{type(t).__qualname__}"
        raise ValueError(f"{what} must be a plain Parameter with values to be merged; got {got}")


@torch.no_grad()
def merged_weight(weight: Tensor, updates: Sequence[tuple[Tensor, Tensor, float]], names: Sequence[str]) -> Tensor:
    """weight plus scaling * left right of every update, computed in fp32 at least and rounded once.

    Equivalent to ``(weight.float() + sum(scaling * left.float() @ right.float() ...)).to(weight.dtype)``.

    Args:
        weight: a plain Parameter, as `check_values` wants it; seen as the matrix [first size, all others].
        updates: left [first size, R], right [R, all others] and the scaling of each.
        names: the adapters', for messages.
    Returns: weight's shape and dtype.
    Raises: ValueError if the weight is not whole, or the result is not finite.
    """
    matrix = updates[0][0].shape[0], updates[0][1].shape[1]
    check_weight(weight, tuple(weight.shape) if weight.dim() > 2 else matrix)
    compute = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.flatten(1).to(compute)
    for left, right, scaling in updates:
        merged = torch.addmm(merged, left.to(compute), right.to(compute), alpha=scaling)
    merged = merged.view(weight.shape).to(weight.dtype)
    if not torch.isfinite(merged).all():
        bad = merged.numel() - int(torch.isfinite(merged).sum())
        raise ValueError(
            f"the weight merged with adapter {', '.join(map(repr, names))} must be finite in {merged.dtype}; got {bad} "
            "elements that are not"
        )
    return merged


@torch.no_grad()
def summed(updates: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The sum of scaling * left right of every update, in fp32: what a quantised weight gets added."""
    (left, right, scaling), *others = updates
    total = scaling * (left.float() @ right.float())
    for left, right, scaling in others:
        total.addmm_(left.float(), right.float(), alpha=scaling)
    return total
