"""What autocast does to the arguments of the ops, before they are checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops.internals import any_autocast_enabled, autocasts


def cast_inputs(x: Any, lora_A: Sequence[Any], lora_B: Sequence[Any], *others: Any) -> tuple[Any, Any, Any, Any]:
    """x, the factors and what else is in x's dtype, as torch.nn.Linear's autocast would cast them; fp32 adapters stay,
    the kernels take them over a half-precision x. What it would not cast stays, and is refused by who checks."""
    if not (any_autocast_enabled() and autocasts(x)):
        return x, lora_A, lora_B, others
    dtype = torch.get_autocast_dtype(x.device.type)
    if any(isinstance(t, Tensor) and t.dtype != torch.float32 for t in (*lora_A, *lora_B)):
        lora_A, lora_B = _cast(dtype, *lora_A), _cast(dtype, *lora_B)
    return _cast(dtype, x)[0], lora_A, lora_B, _cast(dtype, *others)


def _cast(dtype: torch.dtype, *tensors: Any) -> list:
    return [t.to(dtype) if autocasts(t) else t for t in tensors]
