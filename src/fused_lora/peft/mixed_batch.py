"""PEFT's mixed batches, an adapter for each sample, by one update of groups of rows."""

from typing import Any

from torch import Tensor

from fused_lora.nn.mixed_batch import BASE, segments_of_samples
from fused_lora.ops.grouped import grouped_lora_update
from fused_lora.ops.grouped_linear import grouped_lora_linear
from fused_lora.peft.request import Base, Update, adapter_update, readable_base, refuses_all, update_fits


def mixed_forward(layer: Any, x: Tensor, adapter_names: list[str]) -> Tensor | None:
    """y [..., N] of x [B, ..., K] with the adapter of each sample, or None where PEFT must compute it, or refuse."""
    if refuses_all(layer) is not None or x.dim() < 2 or x.shape[0] != len(adapter_names):
        return None
    known = layer._modules["lora_A"]._modules
    own = tuple(name if name in known else BASE for name in adapter_names)
    found = segments_of_samples(own, x.shape[:-1].numel() // max(len(own), 1), x.device)
    updates: list[Update] = []
    for name in found.names:
        update = adapter_update(layer, name)
        if isinstance(update, str) or update.dora is not None or update.bias is not None or not update_fits(x, update):
            return None
        updates.append(update)
        if isinstance(update.scaling, Tensor) or update.lora_A.dtype is not updates[0].lora_A.dtype:
            return None
    if not updates:
        return layer._modules["base_layer"](x)
    lora_A, lora_B, scaling, dropout_p, *_ = zip(*updates)
    base = readable_base(layer)
    if isinstance(base, Base):
        return grouped_lora_linear(x, *base, lora_A, lora_B, scaling, found.offsets, found.rows, dropout_p)
    y = layer._modules["base_layer"](x)
    return grouped_lora_update(y, x, lora_A, lora_B, scaling, found.offsets, rows=found.rows, dropout_p=dropout_p)
