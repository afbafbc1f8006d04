"""What a LoRALinear can stand for: a plain nn.Linear over plain memory."""

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_linear(linear: nn.Module) -> None:
    """Raises ValueError unless a LoRALinear can stand for `linear`: exactly nn.Linear, plain weights in a dtype that a
    product exists in, and nothing attached that would be lost."""
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"linear must be exactly torch.nn.Linear; got {type(linear).__module__}.{type(linear).__qualname__}"
        )
    check_weight(linear.weight, (linear.out_features, linear.in_features))
    if hasattr(linear, "_hf_hook"):
        raise ValueError(
            "linear must carry no accelerate hook, a LoRALinear would not run it: apply_lora first, then dispatch or "
            f"offload the model; got {type(linear._hf_hook).__name__}"
        )
    attached = [name for name in _HOOKS if getattr(linear, name)]
    if "forward" in vars(linear):
        attached.append("forward of its own")
    attached += [name for name, _ in linear.named_parameters() if name not in ("weight", "bias")]
    attached += [name for name, _ in (*linear.named_buffers(), *linear.named_children())]
    if attached:
        raise ValueError(
            f"linear must carry no hooks and nothing else, a LoRALinear would not run them; got {', '.join(attached)}"
        )


def check_weight(weight: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError unless a weight is a plain dense Parameter [N, K]: no DTensor, no quantised or packed form, no
    shard."""
    if type(weight) is not nn.Parameter:
        kind = type(weight)
        raise ValueError(
            "weight must be a plain torch.nn.Parameter: adapters come before sharding and quantisation; got "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    if weight.layout is not torch.strided or weight.is_nested:
        raise ValueError(
            f"weight must be dense and strided; got {'a nested tensor' if weight.is_nested else weight.layout}"
        )
    if weight.dtype not in _DTYPES:
        raise ValueError(f"weight must be bfloat16, float16, float32 or float64; got {weight.dtype}")
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"weight must have shape {list(shape)}, whole and unpacked, when adapters are added; got "
            f"{list(weight.shape)}"
        )
