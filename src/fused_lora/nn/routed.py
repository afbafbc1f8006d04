"""The forward of a mixture's fused experts with low-rank updates computed on the tokens, never on the weights.

transformers gives its experts classes one forward, which hands over to an implementation that the configuration names:
a loop over the experts, or a product of rows sorted by expert. All mean the same: an up projection, a gate or an
activation, a down projection, weighted by the router. `routed` is one more of that meaning.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.ops.experts import grouped_linear
from fused_lora.ops.grouped import grouped_lora_update
from fused_lora.ops.internals import any_module_hook, bare, transforms_active, without_autocast

_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")  # of the same sums in one order or another
_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))


class ExpertUpdate(NamedTuple):
    """What one adapter adds to one parameter of the experts; a first dimension of 1 is shared by all of them."""

    lora_A: Tensor  # [E, R, K] or [1, R, K]
    lora_B: Tensor  # [E, N, R] or [1, N, R]
    scaling: float | Tensor


def unrouted(module: nn.Module, parameter_names: Sequence[str]) -> str | None:
    """Why `routed` can't run this module with updates of these parameters, in words; None if it can."""
    if not _has_interface(type(module)):
        return "it is no experts class of transformers' interface"
    experts: Any = module
    implementation = experts.config._experts_implementation
    if implementation not in _IMPLEMENTATIONS:
        return f"its experts implementation is {implementation!r}"
    if experts._is_expert_parallel:
        return "its experts lie on several devices"
    if any_module_hook() or transforms_active() or not bare(module):
        return "it has hooks or a forward of its own, or a transform of torch.func is at work"
    names = _projections(experts)
    for name in parameter_names:
        if name not in names:
            return f"{name} is none of its products' weights, {' and '.join(names)}"
    for name in names:
        weight = getattr(experts, name)
        if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 3 or weight.dtype not in _DTYPES:
            return f"its {name} is no plain tensor of three dimensions"
        if weight.requires_grad:
            return f"its {name} trains"
    return None


def routed(
    module: Any,
    updates: Mapping[str, Sequence[ExpertUpdate]],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What the module's forward returns, with each update, by parameter name, of its expert's own rows.

    Args:
        module: the experts, for which `unrouted` gives None.
        updates: of the weights, by their names.
        hidden_states: [T, K].
        top_k_index, top_k_weights: [T, k], the experts of each token and their weights.
    Returns: [T, K] in hidden_states' dtype.
    """
    tokens, top_k = top_k_index.shape
    up, down = _projections(module)
    experts, order = top_k_index.reshape(-1).sort()  # [T k]: rows by expert
    starts = torch.arange(getattr(module, up).shape[0] + 1, device=experts.device)
    offsets = torch.searchsorted(experts, starts)  # [E + 1]

    def projected(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        x = x.to(weight.dtype)
        y = grouped_linear(x, weight, offsets, module.is_transposed)
        if module.has_bias:
            y = y + getattr(module, f"{name}_bias")[experts]
        for update in updates.get(name, ()):
            y = _added(y, x, update, offsets)
        return y

    low = projected(hidden_states.index_select(0, order // top_k), up)
    y = projected(module._apply_gate(low) if module.has_gate else module.act_fn(low), down)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return y.index_select(0, back).view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _added(y: Tensor, x: Tensor, update: ExpertUpdate, offsets: Tensor) -> Tensor:
    """y with an update, in the dtype of the experts' weights as PEFT computes it and transformers their products, under
    autocast, too."""
    lora_A, lora_B, scaling = update
    if lora_A.dtype not in (x.dtype, torch.float32):
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    if isinstance(scaling, Tensor):
        scaling = scaling.detach().expand(offsets.shape[0] - 1)
    with without_autocast(x):
        return grouped_lora_update(y, x, lora_A, lora_B, scaling, offsets)


def _projections(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _has_interface(kind: type[nn.Module]) -> bool:
    """Whether the class has the forward that transformers' decorator makes, which is a function of that module."""
    interface = sys.modules.get("transformers.integrations.moe")
    return interface is not None and getattr(kind.forward, "__globals__", None) is vars(interface)
