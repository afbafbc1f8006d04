"""How fresh adapters start where it is not with a random A and a zero B: PEFT's `init_lora_weights`."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters.holders import Layers, holders_of
from fused_lora.adapters.plan import Plan
from fused_lora.config import STARTS_OF_WEIGHTS, LoraConfig
from fused_lora.deepspeed_zero import is_split
from fused_lora.layer_config import LayerConfig
from fused_lora.nn import LoRALinear
from fused_lora.nn.base_linear import absorbable, is_conv1d
from fused_lora.nn.embedding import LoRAEmbedding
from fused_lora.nn.experts import pattern_name
from fused_lora.nn.layer import LoRALayer

FirstFactors = dict[str, tuple[Tensor, Tensor]]  # A and B by layer
_BY_PEFT = ("orthogonal", *STARTS_OF_WEIGHTS)


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


def first_factors(plan: Plan, config: LoraConfig) -> FirstFactors:
    """A and B with which layers start as PEFT has it. They cost memory and may not be found, so this comes before the
    model is changed. Raises: ValueError naming a layer that has none."""
    init, found = config.init_lora_weights, FirstFactors()
    for name, module in plan.linears.items() if init in _BY_PEFT else ():
        if (own := config.layer(name)).r:
            try:
                found[name] = _by_peft(module, own, init)
            except torch.linalg.LinAlgError as error:
                raise ValueError(f"{name}: weight must have factors for init_lora_weights={init!r}; {error}") from None
    return found


def start(root: nn.Module, adapter_name: str, init: bool | str, first: FirstFactors) -> None:
    """Give a fresh adapter its first values. "pissa" and "olora" take them out of the base weights, which keep the
    rest: without the adapter the model is another one then.

    Args:
        root: the model with the adapter.
        adapter_name: the adapter, of which `check_start` saw the plan.
        init: PEFT's init_lora_weights.
        first: the plan's `first_factors`.
    """
    layers: Layers = holders_of(root, adapter_name)[0] if init is not True else {}
    for name, layer in layers.items():
        layer.init_lora_weights[adapter_name] = init
        if layer.r[adapter_name] == 0:
            continue
        lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        with torch.no_grad():
            if init in _BY_PEFT:
                lora_A.copy_(first[name][0])
                lora_B.copy_(first[name][1])
                if init != "orthogonal":
                    _take_out(layer, *first[name], float(layer.scaling[adapter_name]))
            elif isinstance(layer, LoRAEmbedding):
                if init is False:
                    nn.init.normal_(lora_A)
            else:
                if init == "gaussian":
                    nn.init.normal_(lora_A, std=1 / layer.r[adapter_name])
                else:
                    nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
                    if adapter_name in layer.lora_bias:
                        bound = 1 / math.sqrt(layer.r[adapter_name])
                        nn.init.uniform_(layer.lora_bias[adapter_name], -bound, bound)
            if isinstance(layer, LoRALinear):
                layer.reset_magnitude(adapter_name)


def _by_peft(module: Any, own: LayerConfig, init: bool | str) -> tuple[Tensor, Tensor]:
    """A and B of PEFT's layer over the same weight; over Conv1D's as nn.Linear would hold it."""
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora.layer import Linear

    weight = module.weight.detach()
    matrix = weight.t() if is_conv1d(module) or getattr(module, "fan_in_fan_out", False) else weight  # [N, K]
    base = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format), requires_grad=False)
    given = {"r": own.r, "lora_alpha": own.lora_alpha}
    config = PeftConfig(**given, use_rslora=own.use_rslora, init_lora_weights=init)
    theirs = Linear(base, "new", config=config, **given)
    return theirs.lora_A["new"].weight.detach(), theirs.lora_B["new"].weight.detach()


def _take_out(layer: Any, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Leave the rest in the base weight, in PEFT's order of rounding and, as there, in new memory."""
    weight, matrix = layer.weight, layer.matrix()
    rest = (matrix.float() - scaling * lora_B @ lora_A).to(matrix.dtype)
    weight.data = rest if matrix is weight else rest.t().contiguous()
