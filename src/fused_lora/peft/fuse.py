"""fuse(), unfuse() and explain(): PEFT's LoRA layers of a model on the op, and back, and which of them are."""

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fused_lora import backends, bases
from fused_lora.peft.classes import fused_class, swap, swap_back
from fused_lora.peft.dora import dora_base
from fused_lora.peft.experts import PeftParamWrapper, expert_updates
from fused_lora.peft.request import Update, active_update, misfit, readable_base
from fused_lora.peft.tokens import PeftTrainableTokensLayer, tokens_refusal
from fused_lora.peft.ways import Row, Ways

_NOT_YET = "fuse(model) has not been called since the layer was made"


def fuse(model: nn.Module, strict: bool = False) -> Ways:
    """Let the LoRA layers of a PEFT model run on the fused op, in place.

    Equivalent to the model before: names, `state_dict()`, files, merging, switching and adding adapters are PEFT's, and
    a layer runs PEFT's own forward whenever the op can't serve it as it then is. Adapters that are added later to the
    same layers are fused, too; layers that become LoRA layers later want another call, which leaves the others alone.

    Args:
        model: what get_peft_model, PeftModel.from_pretrained or transformers' add_adapter has made, or a part of it.
        strict: raise if a layer's forward would be PEFT's.
    Returns: the table that `explain` gives.
    Raises: ValueError if the model has no adapters of PEFT, or, strict, naming the layers that stay PEFT's and why;
        nothing is changed then.
    """
    layers = list(_layers(model))
    if not layers:
        raise ValueError(f"model must have adapters of PEFT; got a {type(model).__name__} without")
    ways = Ways(tuple(_row(name, layer, fused=True) for name, layer in layers))
    if strict and ways.of("peft"):
        raise ValueError(f"model must have no layer that stays PEFT's; got\n{Ways(ways.of('peft'))}")
    for _, layer in layers:
        swap(layer)
    return ways


def unfuse(model: nn.Module) -> None:
    """Give the LoRA layers of a model PEFT's own forward again, in place; undoes `fuse`, `patched` and
    `custom_module_mapping`."""
    for _, layer in _layers(model):
        swap_back(layer)


def explain(model: nn.Module) -> Ways:
    """Which adapted layers of a PEFT model run fused and which through PEFT's own forward, and why, as they now are.

    It says what a call with x alone gets, in the base weight's dtype or under autocast; with `adapter_names` one
    update serves all adapters of the batch, with other arguments PEFT's forward runs.
    """
    return Ways(tuple(_row(name, layer, type(layer) is fused_class(layer)) for name, layer in _layers(model)))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got a {type(model).__name__}")
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer))


def _row(name: str, layer: Any, fused: bool) -> Row:
    """How the layer runs if it is, or is not, of the fused class."""
    if fused_class(layer) is None:
        kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
        return Row(name, "peft", f"a {kind} is served by PEFT alone")
    if "forward" in layer.__dict__:
        return Row(name, "peft", "the layer has a forward of its own")
    if isinstance(layer, PeftParamWrapper):
        return _experts(name, layer, fused)
    if isinstance(layer, PeftTrainableTokensLayer):
        return _tokens(name, layer, fused)
    update, base = active_update(layer), readable_base(layer)
    refused = update if isinstance(update, str) else None if isinstance(base, str) else misfit(base, update)
    if isinstance(base, str) and isinstance(update, Update) and update.dora is not None and dora_base(layer) is None:
        refused = f"{base}, and its adapter is DoRA"
    if refused is not None:
        return Row(name, "peft", refused)
    if not fused:
        return Row(name, "peft", _NOT_YET)
    if isinstance(base, str):
        return _around(name, layer.base_layer, base)
    back_end, why = backends.explain(base.weight.device, base.weight.dtype)
    return Row(name, "fused", f"back end {back_end}: {why}")


def _experts(name: str, layer: Any, fused: bool) -> Row:
    """A wrapper of a parameter."""
    refused = expert_updates(layer)
    if isinstance(refused, str):
        return Row(name, "peft", f"a ParamWrapper of {layer.parameter_name}: {refused}")
    if not fused:
        return Row(name, "peft", _NOT_YET)
    how = "its experts' own products of tokens sorted by expert, and one grouped call adds the update"
    return Row(name, "update", f"{layer.parameter_name}: {how}")


def _tokens(name: str, layer: Any, fused: bool) -> Row:
    """An embedding, or a head, of which rows train."""
    refused = tokens_refusal(layer, layer.active_adapters)
    if refused is not None or not fused:
        return Row(name, "peft", refused or _NOT_YET)
    return Row(name, "update", "rows of its weight: its own product, in which theirs are replaced")


def _around(name: str, base_layer: nn.Module, why: str) -> Row:
    """A layer whose base weight is no plain matrix."""
    base = bases.of(base_layer)
    if base is not None and base.untouched():
        return Row(name, "fused", f"{why}: dequantised for each call, or its own product where that is faster")
    return Row(name, "update", f"{why}: it computes its own product, and one call adds the update")
