"""What a call of a PEFT layer asks of the op, read from the layer as it is at that call; or, in a sentence, why not.

Nothing is remembered from call to call: adapters, hooks, scalings, dtypes and devices may change at any time, and all
of it is read in less time than one of the four module calls that PEFT's forward makes.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fused_lora.deepspeed_zero import hooks_are_zero_s, is_absent
from fused_lora.ops.internals import (
    PLAIN_TENSORS,
    any_autocast_enabled,
    any_module_hook,
    autocasts,
    own_parameter,
    unhooked,
)
from fused_lora.ops.update import joined

_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))


class Base(NamedTuple):
    """The base layer's tensors."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]


class Update(NamedTuple):
    """The low-rank update of the active adapters together."""

    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    scaling: float | Tensor
    dropout_p: float
    bias: Tensor | None  # [N], lora_bias with its scaling
    dora: nn.Module | None = None  # PEFT's DoraLinearLayer, which holds m [N]


def refuses_all(layer: Any) -> str | None:
    """Why PEFT must compute the layer, whatever its adapters are; None if it need not."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base weight"
    if any_module_hook():
        return "a hook on all modules wants to see each one called"
    return None


def active_update(layer: Any) -> Update | str:
    """What the layer's active adapters add in its present state, or why PEFT must compute it."""
    refused = refuses_all(layer)
    if refused is not None:
        return refused
    known = layer._modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in known]
    if len(names) == 1:
        return adapter_update(layer, names[0])
    if not names:
        return "none of its adapters is active"
    updates = [adapter_update(layer, name) for name in names]
    reasons = [each for each in updates if isinstance(each, str)]
    return reasons[0] if reasons else _joined([each for each in updates if isinstance(each, Update)])


def readable_base(layer: Any) -> Base | str:
    """The tensors of the base layer, or why its own forward must run."""
    base = layer._modules["base_layer"]
    if not _bare(base):
        return "its base layer has hooks or a forward of its own"
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        return f"its base layer is a {_class(base)}"
    weight, bias = own_parameter(base, "weight"), own_parameter(base, "bias")
    if weight is None or not _plain(weight) or weight.layout is not torch.strided:
        return f"its base weight is {_kind(weight)}"
    if bias is not None and not _plain(bias):
        return f"its base bias is {_kind(bias)}"
    return Base(weight.t() if layer.fan_in_fan_out else weight, bias)


def norm_source(layer: Any) -> Tensor | None:
    """The tensor in which the base layer holds its weight, in whatever form."""
    return own_parameter(layer._modules["base_layer"], "weight")


def linear_fits(x: Tensor, base: Base, update: Update) -> bool:
    """Whether `lora_linear` computes with these dtypes what PEFT does; `misfit` is the rule without x."""
    if x.dtype is base.weight.dtype:
        return update_fits(x, update)
    return any_autocast_enabled() and autocasts(x) and _dense(x) and _castable(*base, *update[:2])


def update_fits(x: Tensor, update: Update) -> bool:
    """Whether `lora_update` computes with these dtypes what PEFT does."""
    adapter = update.lora_A.dtype
    if adapter is x.dtype or (adapter is torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        return x.dtype in _DTYPES and _dense(x)
    return any_autocast_enabled() and autocasts(x) and _dense(x) and _castable(*update[:2])


def _dense(x: Tensor) -> bool:
    """Whether the op takes a tensor of this layout, or a nested one."""
    return x.layout is torch.jagged or (x.layout is torch.strided and not x.is_nested)


def misfit(base: Base, update: Update) -> str | None:
    """Why an x of the weight's dtype, without autocast, would go through PEFT; None if it would not."""
    dtype, adapter = base.weight.dtype, update.lora_A.dtype
    if dtype not in _DTYPES:
        return f"its base weight is {_name(dtype)}"
    if adapter not in (dtype, torch.float32):
        return f"its adapters are {_name(adapter)} over a base weight in {_name(dtype)} (fused under autocast)"
    return None


def _castable(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype in _DTYPES and t.dtype is not torch.float64) for t in tensors)


def _plain(t: Any) -> bool:
    """Whether the op takes what holds a parameter's values."""
    return type(t) in PLAIN_TENSORS and not is_absent(t)


def _bare(module: Any) -> bool:
    """Whether calling the module would run its class's forward and nothing else, but for what reading a tensor does."""
    own = module.__dict__
    if "forward" not in own:
        return unhooked(module) or hooks_are_zero_s(module)
    # ms-swift gives A and B one that moves x to the weight's device and calls what was their forward
    moves, forward = getattr(own["forward"], "__func__", None), own.get("forward_origin")
    known = getattr(moves, "__module__", "") == "swift.tuners.peft" and own["forward"].__self__ is module
    return known and getattr(forward, "__func__", None) is type(module).forward and unhooked(module)


def adapter_update(layer: Any, name: str) -> Update | str:
    """What one adapter adds, or why PEFT must compute it."""
    modules = layer._modules
    module_A, module_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    variant, dora = layer.lora_variant.get(name), None
    if type(variant) is DoraLinearVariant:
        dora = modules["lora_magnitude_vector"]._modules[name]
        if type(dora) is not DoraLinearLayer or not _bare(dora) or not _plain(own_parameter(dora, "weight")):
            return (
                f"adapter {name!r} holds its magnitudes in a {_class(dora)} with {_kind(own_parameter(dora, 'weight'))}"
            )
    elif variant is not None:
        kind = type(variant).__name__.removesuffix("LinearVariant")
        return f"adapter {name!r} is no plain LoRA ({kind})"
    if type(module_A) is not nn.Linear or type(module_B) is not nn.Linear:
        other = module_B if type(module_A) is nn.Linear else module_A
        return f"adapter {name!r} has a {_class(other)} in the place of an nn.Linear"
    if not (_bare(module_A) and _bare(module_B) and _bare(dropout)):
        return f"adapter {name!r} has hooks or a forward of its own"
    lora_A, lora_B = own_parameter(module_A, "weight"), own_parameter(module_B, "weight")
    if lora_A is None or lora_B is None or not (_plain(lora_A) and _plain(lora_B)):
        other = lora_B if _plain(lora_A) else lora_A
        return f"adapter {name!r} holds {_kind(other)}"
    if lora_A.dtype is not lora_B.dtype:
        return f"adapter {name!r} has lora_A in {_name(lora_A.dtype)} and lora_B in {_name(lora_B.dtype)}"
    if own_parameter(module_A, "bias") is not None:
        return f"adapter {name!r} has a bias in lora_A"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's casting of its input is switched off"
    if type(dropout) is nn.Identity:
        dropout_p = 0.0
    elif type(dropout) is nn.Dropout and not dropout.inplace and dropout.p < 1.0:
        drops = dropout.training and (dora is None or layer.training)  # PEFT's DoRA asks the layer, too
        dropout_p = dropout.p if drops else 0.0
    else:
        return f"adapter {name!r} has a dropout that the op has not: {dropout}"
    scaling, bias = layer.scaling[name], own_parameter(module_B, "bias")
    if isinstance(scaling, Tensor) and scaling.dim():
        return f"adapter {name!r} has a scaling of shape {list(scaling.shape)}"
    return Update(lora_A, lora_B, scaling, dropout_p, bias if bias is None else bias * scaling, dora)


def _joined(updates: list[Update]) -> Update | str:
    """Several active adapters as one of their ranks' sum."""
    if any(update.dora is not None for update in updates):
        return "several adapters are active, of which one is DoRA"
    if any(update.dropout_p for update in updates):
        return "several adapters are active, each with a dropout mask of its own"
    if len({update.lora_A.dtype for update in updates}) > 1:
        return "several adapters of different dtypes are active"
    lora_As, lora_Bs, scalings, *_ = zip(*updates)
    biases = [update.bias for update in updates if update.bias is not None]
    return Update(*joined(lora_As, lora_Bs, scalings), 1.0, 0.0, sum(biases[1:], biases[0]) if biases else None)


def _kind(t: Any) -> str:
    if type(t) in PLAIN_TENSORS and t.layout is not torch.strided:
        return f"a tensor in layout {t.layout}"
    if type(t) in PLAIN_TENSORS:
        return f"a {type(t).__name__} in pieces, until ZeRO-3 gathers them for a forward"
    gathered = ", until FSDP2 gathers it for a forward" if type(t).__name__ == "DTensor" else ""
    return f"a {type(t).__name__}, no plain tensor{gathered}"


def _class(module: Any) -> str:
    return f"{type(module).__module__.partition('.')[0]} {type(module).__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
