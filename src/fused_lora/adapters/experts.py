"""Adapters of a mixture's experts: their rank, and factors that they share."""

import re
from typing import Any

from torch import nn

from fused_lora.adapters.holders import holders_of
from fused_lora.adapters.model import check_not_merged
from fused_lora.adapters.wrappers import unwrapped
from fused_lora.config import unknown_name
from fused_lora.nn.expert_layouts import Factor
from fused_lora.nn.experts import LoRAParameter

_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_FUSED = ("gate_up_proj", "up_proj", "down_proj")
_FACES_RESIDUAL: dict[str, Factor] = {"gate_up_proj": "lora_A", "up_proj": "lora_A", "down_proj": "lora_B"}


def expert_rank_pattern(model: nn.Module, r: int, n_active: int | None = None) -> dict[str, int]:
    """rank_pattern that divides a rank among the experts that act on a token.

    Equivalent to ``{name: r // n_active}`` of every fused parameter in a module called `experts` and every linear layer
    in a list of that name, by their common names: so a mixture has the ratio of LoRA's parameters to its own that a
    dense layer has at rank r. For `LoraConfig`, ours or PEFT's; lora_alpha stays where target_parameters names the
    experts. Under target_modules="all-linear" PEFT's convention doubles that of gate_up_proj, if no alpha_pattern has
    these keys.

    Args:
        model: a mixture, plain or with adapters.
        r: the rank that a dense layer has.
        n_active: experts of a token; None reads it in the model's configuration.
    Raises: ValueError if the model has no experts, or the configuration doesn't say how many act; for a rank that
        leaves none for each.
    Source: Schulman and Thinking Machines Lab, LoRA Without Regret, 2025.
    """
    if n_active is None:
        n_active = experts_per_token(unwrapped(model))
    if n_active is None:
        raise ValueError(f"n_active must be given for a model whose configuration has none of {list(_PER_TOKEN)}")
    if not isinstance(r, int) or not isinstance(n_active, int) or not 1 <= n_active <= r:
        raise ValueError(f"r must be an int of at least n_active, the experts of a token; got {r!r} and {n_active!r}")
    names = {name for name, _ in model.named_parameters()}
    keys = [rf"experts\.{name}" for name in _FUSED if any(_is_fused(key, name) for key in names)]
    if any(re.search(r"(^|\.)experts\.\d+\.", name) for name in names):
        keys.append(r"experts\.\d+\..+")
    if not keys:
        raise ValueError(f"model must have modules or parameters in one called experts; got a {type(model).__name__}")
    return dict.fromkeys(keys, r // n_active)


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts act on a token by the model's configuration, None where it has no word for that."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return next((n for key in _PER_TOKEN if isinstance(n := getattr(config, key, None), int)), None)


def _is_fused(key: str, name: str) -> bool:
    return re.search(rf"(^|\.)experts\.(base_layer\.)*{name}$", key) is not None


def share_outer(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Let all experts share the factors of an adapter that face the residual stream, in place.

    A of gate_up_proj and up_proj becomes [R, in] instead of [E R, in], B of down_proj [out, R] instead of [out, R E]:
    one Parameter each, whose gradient is the sum over the experts. Make the optimizer after this call. `save_adapter`
    writes PEFT's file, with the factors repeated, which loads as an adapter that shares none.

    Args:
        model: with a fresh adapter on fused experts, by target_parameters; or one whose experts have equal factors.
        adapter_name: the adapter.
    Returns: model.
    Raises: ValueError for an adapter that is unknown, merged, on no experts, on a parameter of another name, or whose
        factors differ; nothing is changed then.
    Source: the layout of Thinking Machines Lab's tinker-cookbook.
    """
    check_not_merged(model, "factors are shared")
    layers, _ = holders_of(unwrapped(model), adapter_name)
    experts = {n: layer for n, layer in layers.items() if isinstance(layer, LoRAParameter) and layer.num_experts > 1}
    if not experts:
        raise ValueError(f"adapter {adapter_name!r} must be on parameters of experts, by target_parameters; got none")
    for layer in experts.values():
        if layer.parameter_name not in _FACES_RESIDUAL:
            raise unknown_name("a parameter whose factor is shared", layer.parameter_name, _FACES_RESIDUAL)
        layer.check_shareable(adapter_name, _FACES_RESIDUAL[layer.parameter_name])
    for layer in experts.values():
        layer.share(adapter_name, _FACES_RESIDUAL[layer.parameter_name])
    return model
