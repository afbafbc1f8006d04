"""How fresh adapters start where it is not with a random A and a zero B: PEFT's `init_lora_weights`."""

import math
from collections import Counter
from typing import Any

import torch
from torch import nn

from fused_lora.adapters.holders import Layers, holders_of
from fused_lora.adapters.plan import Plan
from fused_lora.config import LoraConfig
from fused_lora.deepspeed_zero import is_split
from fused_lora.nn import LoRALinear
from fused_lora.nn.base_linear import absorbable
from fused_lora.nn.experts import LoRAParameter, pattern_name
from fused_lora.nn.layer import LoRALayer

_BY_PEFT = ("orthogonal", "pissa", "olora")


def check_start(plan: Plan, config: LoraConfig) -> None:
    """Raises ValueError if some layer cannot start as the configuration says, or PEFT is needed and not there."""
    init = config.init_lora_weights
    if init not in _BY_PEFT:
        return
    try:
        import peft.tuners.lora  # noqa: F401
    except ImportError:
        raise ValueError(
            f"init_lora_weights={init!r} is PEFT's, which is not installed: pip install 'fused-lora[peft]'"
        ) from None
    for name, target in plan.parameters.items():
        raise ValueError(f"init_lora_weights={init!r} needs linear layers; got {pattern_name(name, target)}")
    modules = {id(place.module): place.module for place in plan.places}.values()
    bases = [module.base() if isinstance(module, LoRALayer) else module for module in modules]
    owners = Counter(id(parameter) for base in bases for parameter in base.parameters(recurse=False))
    for name, module in plan.linears.items():
        weight, r = getattr(module, "weight", None), config.layer(name).r
        plain = module.base() is module if isinstance(module, LoRALayer) else absorbable(module)
        if not plain or not isinstance(weight, nn.Parameter) or weight.is_meta or is_split(weight):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"init_lora_weights={init!r} needs plain linear layers with whole values; got {name}, a {kind}"
            )
        if init != "orthogonal" and owners[id(weight)] > 1:
            raise ValueError(
                f"init_lora_weights={init!r} changes the weight, which must be of one layer alone; got {name}, tied"
            )
        if init == "pissa" and r and config.layer(name).scaling <= 0:  # whose root A and B are divided by
            raise ValueError(
                f"lora_alpha must be > 0 with init_lora_weights='pissa'; got {config.layer(name).lora_alpha} in {name}"
            )
        if init == "orthogonal" and r % 2:
            raise ValueError(f"r must be even with init_lora_weights='orthogonal'; got {r} in {name}")
        if init != "orthogonal" and (weight.dtype is torch.float64 or r > min(weight.shape)):
            raise ValueError(
                f"init_lora_weights={init!r} needs a weight of at most 32 bits and r up to its smaller side; got "
                f"{weight.dtype} of shape {list(weight.shape)} and r={r} in {name}"
            )
        if init != "orthogonal" and r and not torch.isfinite(weight).all():
            raise ValueError(f"{name}: weight must be finite with init_lora_weights={init!r}; got others")


def start(root: nn.Module, adapter_name: str, init: bool | str) -> None:
    """Give a fresh adapter its first values. "pissa" and "olora" take them out of the base weights, which keep the
    rest: without the adapter the model is another one then.

    Args:
        root: the model with the adapter.
        adapter_name: the adapter, of which `check_start` saw the plan.
        init: PEFT's init_lora_weights.
    """
    layers: Layers = holders_of(root, adapter_name)[0] if init is not True else {}
    for layer in layers.values():
        layer.init_lora_weights[adapter_name] = init
        if layer.r[adapter_name] == 0:
            continue
        lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        with torch.no_grad():
            if init in _BY_PEFT:
                _by_peft(layer, adapter_name, init)
            elif isinstance(layer, LoRALinear | LoRAParameter):
                if init == "gaussian":
                    nn.init.normal_(lora_A, std=1 / layer.r[adapter_name])
                else:
                    nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
                    if adapter_name in layer.lora_bias:
                        bound = 1 / math.sqrt(layer.r[adapter_name])
                        nn.init.uniform_(layer.lora_bias[adapter_name], -bound, bound)
            if isinstance(layer, LoRALinear):
                layer.reset_magnitude(adapter_name)


def _by_peft(layer: Any, adapter_name: str, init: bool | str) -> None:
    """A and B of PEFT's layer over the same weight; over Conv1D's as nn.Linear would hold it."""
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora.layer import Linear

    weight, matrix = layer.weight.requires_grad_(False), layer.matrix()  # [N, K]
    base = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    base.weight = weight if matrix is weight else nn.Parameter(matrix.contiguous(), requires_grad=False)
    given = {"r": layer.r[adapter_name], "lora_alpha": layer.lora_alpha[adapter_name]}
    config = PeftConfig(**given, use_rslora=layer.use_rslora[adapter_name], init_lora_weights=init)
    theirs = Linear(base, adapter_name, config=config, **given)
    if base.weight is not weight:
        matrix.copy_(base.weight)
    layer.lora_A[adapter_name].copy_(theirs.lora_A[adapter_name].weight)
    layer.lora_B[adapter_name].copy_(theirs.lora_B[adapter_name].weight)
