"""What a layer with adapters can stand for or be built around: modules that compute a linear map."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fused_lora.deepspeed_zero import whole_shape
from fused_lora.ops.internals import bare, runs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))  # GPTQ's layers have the second pair


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer whose weight [K, N] lies transposed; transformers is not
    imported to ask it."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means a module: an nn.Linear of any kind, or transformers' Conv1D; but not the projection in
    an nn.MultiheadAttention, which reads its weight and never calls it."""
    known = isinstance(module, nn.Linear) or is_conv1d(module)
    return known and not isinstance(module, NonDynamicallyQuantizableLinear)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """K and N of a module that computes a linear map. Raises: ValueError for any other."""
    for names in (("nx", "nf"),) if is_conv1d(module) else _SIZES:
        K, N = (getattr(module, name, None) for name in names)
        if isinstance(K, int) and isinstance(N, int):
            return K, N
    raise ValueError(
        "linear must be a linear layer: torch.nn.Linear, a subclass, transformers' Conv1D or a module with in_features "
        f"and out_features; got {_name(module)}"
    )


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_linear(linear: Any) -> None:
    """Raises ValueError unless a layer with adapters can stand for `linear` or be built around it."""
    if isinstance(linear, nn.MultiheadAttention):
        raise ValueError(
            "linear must be a linear layer; got torch.nn.MultiheadAttention: target_parameters can name its "
            "in_proj_weight, and PEFT's own layer for it, which fused_lora.peft.fuse leaves alone, adapts out_proj, too"
        )
    K, N = linear_sizes(linear)
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise ValueError(
            "linear must be called by the module around it, torch.nn.MultiheadAttention reads the weight of its "
            f"projection and would pass by the adapter; got {_name(linear)}"
        )
    if runs(linear, nn.Linear) or (is_conv1d(linear) and "forward" not in vars(linear)):
        weight = linear.weight
        if is_plain_weight(weight) or weight.is_nested:
            check_weight(weight, (K, N) if is_conv1d(linear) else (N, K))


def absorbable(linear: nn.Module) -> bool:
    """Whether a module that `check_linear` lets pass is nothing but its weight and bias, so that a layer can take over
    the two Parameters: nn.Linear's or Conv1D's own forward, plain memory and nothing attached that would be lost."""
    conv1d = is_conv1d(linear) and type(linear) is sys.modules["transformers.pytorch_utils"].Conv1D
    attached = [name for name, _ in linear.named_parameters() if name not in ("weight", "bias")]
    attached += [name for name, _ in (*linear.named_buffers(), *linear.named_children())]
    if attached or not (conv1d or runs(linear, nn.Linear)) or not bare(linear):
        return False
    return is_plain_weight(linear.weight) and (linear.bias is None or is_plain_weight(linear.bias))


def is_plain_weight(weight: Any) -> bool:
    """Whether a weight is a Parameter over plain memory, or stands for one in a model without values (FakeTensorMode),
    where nn.Parameter makes another type."""
    return type(weight) is nn.Parameter or (isinstance(weight, nn.Parameter) and hasattr(weight, "fake_mode"))


def check_weight(weight: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a weight is a plain dense Parameter of this shape: no DTensor, no quantised or packed
    form, no shard."""
    if not is_plain_weight(weight):
        kind = type(weight)
        raise ValueError(
            "weight must be a plain torch.nn.Parameter, neither sharded nor quantised nor made from others; got "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    if weight.layout is not torch.strided or weight.is_nested:
        raise ValueError(
            f"weight must be dense and strided; got {'a nested tensor' if weight.is_nested else weight.layout}"
        )
    if weight.dtype not in _DTYPES:
        raise ValueError(f"weight must be bfloat16, float16, float32 or float64; got {weight.dtype}")
    if whole_shape(weight) != shape:
        raise ValueError(
            f"weight must have shape {list(shape)}, whole and unpacked, when adapters are added; got "
            f"{list(weight.shape)}"
        )
