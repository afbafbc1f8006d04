"""Adapters off a model again: for a while, one of them, or all, folded into the weights or not."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fused_lora.adapters.holders import (
    active_adapters,
    adapter_names,
    all_holders,
    biased_adapters,
    held,
    holders_of,
    named_holders,
    naming,
    train_biases,
)
from fused_lora.adapters.merging import choose_to_merge, untie
from fused_lora.adapters.model import check_not_merged, check_not_mixed, check_unlinked
from fused_lora.adapters.places import walk
from fused_lora.adapters.wrappers import is_sharded, unwrapped
from fused_lora.config import unknown_name
from fused_lora.nn.by_name import ActiveAdapter
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.modules_to_save import ModuleToSave


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model: inside, no adapter and no module of modules_to_save acts.

    What trains stays as it is, so an optimizer sees no change. On leaving, the active adapters act again.

    Raises: ValueError if an adapter is merged into some layer.
    """
    before = switch_off(model)
    try:
        yield model
    finally:
        switch_on(model, before)


def switch_off(model: nn.Module) -> dict[str, ActiveAdapter]:
    """Have no adapter act; biases that trained with one stay as trained. Returns: what acted, by layer and wrapper."""
    root = unwrapped(model)
    check_not_merged(root, "adapters are switched off")
    check_not_mixed(root, "disable_adapter")
    if not biased_adapters(all_holders(root)[0]).keys().isdisjoint(active_adapters(root)):
        warnings.warn("biases that trained with an adapter stay as trained while it is switched off", stacklevel=4)
    holders = named_holders(root)
    before = {name: holder.active_adapter for name, holder in holders.items()}
    for holder in holders.values():
        holder.active_adapter = None
    return before


def switch_on(model: nn.Module, before: dict[str, ActiveAdapter]) -> None:
    """Have act again what `switch_off` said, where it is still there."""
    for name, holder in named_holders(unwrapped(model)).items():
        holder.active_adapter = held(before.get(name), holder)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter of the model; where it was active, no adapter is, and a warning says so where others are left.
    Without its last adapter the model is the plain one again, as after `unload`.

    Raises: ValueError for an unknown adapter, a merged one, or a sharded model; nothing changes then.
    """
    root = unwrapped(model)
    check_deletable(root, [adapter_name])
    if adapter_names(root) == [adapter_name]:
        unload(model)
        return
    layers, wrappers = holders_of(root, adapter_name)
    acted = active_adapters(root) == [adapter_name]
    train_biases(root, adapter_name, False)
    for layer in layers.values():
        layer.delete_adapter(adapter_name)
    for wrapper in wrappers.values():
        if wrapper.active_adapter == adapter_name:
            wrapper.set_adapter(None)
        del wrapper.modules_to_save[adapter_name]
    if acted:
        left = adapter_names(root)
        warnings.warn(f"no adapter of the model is active now, nor trains: set_adapter to one of {left}", stacklevel=2)


def check_deletable(root: nn.Module, names: list[str]) -> None:
    """Raises ValueError if `delete_adapter` would refuse one of these adapters."""
    for name in names:
        if name not in adapter_names(root):
            raise unknown_name("adapter_name", name, adapter_names(root))
    _check_removable(root)
    for name in names:
        check_unlinked(holders_of(root, name)[0], "an adapter is taken off")


def unload(model: nn.Module) -> nn.Module:
    """Take all adapters off, in place: every layer is the plain one that it was, over the same Parameters, so tied
    weights stay tied. They stay frozen. What "pissa" and "olora" took out of the weights goes with their adapter.

    Returns: model.
    Raises: ValueError for a model without adapters, a merged, sharded or offloaded one; nothing changes then.
    """
    root = unwrapped(model)
    _check_removable(root)
    places = _places(root)
    layers, wrappers = all_holders(root)
    check_unlinked(layers, "an adapter is taken off")
    for name in biased_adapters(layers):
        train_biases(root, name, False)
    for layer in layers.values():
        _replace(places, layer, layer.plain())
    for wrapper in wrappers.values():
        _replace(places, wrapper, wrapper.original_module)
    _release(root)
    return model


def merge_and_unload(model: nn.Module, adapter_name: str | list[str] | None = None) -> nn.Module:
    """Fold an adapter into the weights for good, in place, and take all adapters off: a plain, frozen model is left.

    One layer is merged after the other, each into a new tensor, so there is no second copy of all weights. Where a
    merged weight was tied to another one, as an output head to the embedding, it no longer is, and the model's
    configuration is told so.

    Args:
        model: a model with adapters, none of them merged, not sharded and not offloaded.
        adapter_name: the adapter to merge, or a list of some; None takes the active ones.
    Returns: model.
    Raises: ValueError as `merged`; nothing changes then. Only if a merged weight is not finite, some layers are merged
        already, and the others still have their adapters, of which this one acts.
    """
    root = unwrapped(model)
    _check_removable(root)
    choose_to_merge(root, adapter_name)
    places = _places(root)
    layers, wrappers = all_holders(root)
    for name in biased_adapters(layers):
        train_biases(root, name, False)
    while layers:  # which keeps no layer, and so no weight, longer than needed
        name, layer = layers.popitem()  # the last first: of a module's parameters the inner before the outer
        if layer.active_adapter is not None:
            with naming(name):
                layer.merge()
        _replace(places, layer, layer.plain())
    for wrapper in wrappers.values():
        wrapper.merge()
    for wrapper in wrappers.values():
        _replace(places, wrapper, wrapper.plain().requires_grad_(False))
    untie(root)
    _release(root)
    return model


def _check_removable(root: nn.Module) -> None:
    """Raises ValueError unless adapters can be taken off the model now."""
    layers, wrappers = all_holders(root)
    if not layers and not wrappers:
        raise ValueError("model must have adapters of this library; got one without")
    check_not_merged(root, "an adapter is taken off")
    check_not_mixed(root, "taking an adapter off")
    if is_sharded(root):
        raise ValueError(
            "model must not be sharded when adapters are taken off: save_adapter and load the base model again; got a "
            "sharded one"
        )
    for place in walk(root):
        holds = isinstance(place.module, LoRALayer | ModuleToSave)
        if holds and hasattr(place.module, "_hf_hook"):  # a base layer that is kept whole keeps its own
            raise ValueError(
                f"{place.name} must carry no accelerate hook when adapters are taken off, it would be lost: "
                "accelerate.hooks.remove_hook_from_submodules first"
            )
        if holds and place.attribute == "_orig_mod":
            raise ValueError(f"{place.name} must not be compiled by itself when adapters are taken off")


def _places(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module is reached, as parent and attribute."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for place in walk(root):
        places.setdefault(id(place.module), []).append((place.parent, place.attribute))
    return places


def _replace(places: dict[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module) -> None:
    for parent, attribute in places[id(old)]:
        setattr(parent, attribute, new)


def _release(root: nn.Module) -> None:
    from fused_lora.adapters.transformers_model import release  # which binds the functions of this file

    release(root)
