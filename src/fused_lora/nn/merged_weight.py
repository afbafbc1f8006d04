"""The weight of a linear layer with an adapter folded in."""

import torch
from torch import Tensor, nn

from fused_lora.nn.base_linear import check_weight


@torch.no_grad()
def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, adapter_name: str) -> Tensor:
    """weight + scaling * B A, computed in fp32 at least and rounded once.

    Equivalent to ``(weight.float() + scaling * lora_B.float() @ lora_A.float()).to(weight.dtype)``.

    Args:
        weight: [N, K], a plain Parameter.
        lora_A, lora_B: [R, K] and [N, R], plain Parameters.
        scaling: the factor.
        adapter_name: for messages.
    Returns: [N, K] in weight's dtype.
    Raises: ValueError if a tensor is not whole and here (sharded, offloaded, on the meta device), or the result is not
        finite.
    """
    check_weight(weight, (lora_B.shape[0], lora_A.shape[1]))
    for what, t in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if type(t) is not nn.Parameter or t.is_meta:
            got = "one on the meta device" if t.is_meta else type(t).__name__
            raise ValueError(f"{what} must be a plain Parameter with values to be merged; got {got}")
    compute = torch.promote_types(weight.dtype, torch.float32)
    merged = torch.addmm(weight.to(compute), lora_B.to(compute), lora_A.to(compute), alpha=scaling).to(weight.dtype)
    if not torch.isfinite(merged).all():
        bad = merged.numel() - int(torch.isfinite(merged).sum())
        raise ValueError(
            f"the weight merged with adapter {adapter_name!r} must be finite in {merged.dtype}; got {bad} elements "
            "that are not"
        )
    return merged
