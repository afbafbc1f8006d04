"""The layers and wrappers of a model that hold adapters, and an adapter's tensors by their keys in PEFT's file."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fused_lora.adapters.peft_format import file_key
from fused_lora.adapters.places import walk
from fused_lora.adapters.wrappers import plain_key
from fused_lora.nn.adapter_tensors import set_trainable
from fused_lora.nn.by_name import ActiveAdapter, as_list, one_or_list
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.modules_to_save import ModuleToSave
from fused_lora.nn.trained_rows import TrainedRows

Layers = dict[str, LoRALayer]
Wrappers = dict[str, ModuleToSave]
Holder = LoRALayer | ModuleToSave


def all_holders(model: nn.Module) -> tuple[Layers, Wrappers]:
    """Every layer and wrapper that can hold an adapter, each once, by the first name it is reached by."""
    layers: Layers = {}
    wrappers: Wrappers = {}
    seen: set[int] = set()
    for place in walk(model):
        if id(place.module) not in seen:
            seen.add(id(place.module))
            if isinstance(place.module, LoRALayer):
                layers[place.name] = place.module
            elif isinstance(place.module, ModuleToSave):
                wrappers[place.name] = place.module
    return layers, wrappers


def named_holders(model: nn.Module) -> dict[str, Holder]:
    """Layers and wrappers together."""
    layers, wrappers = all_holders(model)
    return {**layers, **wrappers}


def holders_of(model: nn.Module, adapter_name: str) -> tuple[Layers, Wrappers]:
    """The layers and wrappers that hold this adapter."""
    layers, wrappers = all_holders(model)
    return (
        {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A},
        {name: wrapper for name, wrapper in wrappers.items() if adapter_name in wrapper.modules_to_save},
    )


def rows_of(wrappers: Wrappers, adapter_name: str) -> dict[str, list[int]]:
    """The rows that an adapter trains of modules in these wrappers, but for those that are tied to others."""
    held = {name: wrapper.modules_to_save[adapter_name] for name, wrapper in wrappers.items()}
    return {name: rows.rows for name, rows in held.items() if isinstance(rows, TrainedRows) and not rows.is_tied}


def are_tied(wrappers: Wrappers, adapter_name: str) -> bool:
    """Whether an adapter's full copies of modules in these wrappers have tensors in common."""
    copies = [wrapper.modules_to_save[adapter_name] for wrapper in wrappers.values()]
    tensors = [id(tensor) for copied in copies for tensor in copied.parameters()]
    return len(set(tensors)) < len(tensors)


def copy_saved(wrappers: Wrappers, adapter_name: str, new_name: str) -> None:
    """Give a new adapter frozen copies of what another trains in these wrappers; what is tied stays so."""
    memo: dict[int, Any] = {id(wrapper.original_module): wrapper.original_module for wrapper in wrappers.values()}
    for wrapper in wrappers.values():
        if adapter_name in wrapper.modules_to_save:
            copied = copy.deepcopy(wrapper.modules_to_save[adapter_name], memo)
            wrapper.modules_to_save[new_name] = copied.requires_grad_(False)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, sorted."""
    layers, wrappers = all_holders(model)
    return sorted(
        {name for layer in layers.values() for name in layer.lora_A}
        | {name for wrapper in wrappers.values() for name in wrapper.modules_to_save}
    )


def module_names(model: nn.Module) -> list[str]:
    """The names that all modules of the plain model have."""
    names: list[str] = []
    for place in walk(model):
        names.append(place.name)
        base = place.module.base() if isinstance(place.module, LoRALayer) else place.module
        if base is not place.module:
            names += [f"{place.name}.{name}" for name, _ in base.named_modules() if name]
    return names


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that act somewhere in a model, sorted."""
    return sorted({name for holder in named_holders(model).values() for name in as_list(holder.active_adapter)})


def held(adapter_name: ActiveAdapter, holder: Holder) -> Any:
    """The adapter's name if the layer or wrapper holds it; of a list those that it holds, a list where they are
    several."""
    own = holder.lora_A if isinstance(holder, LoRALayer) else holder.modules_to_save
    return one_or_list([name for name in as_list(adapter_name) if name in own])


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Have a ValueError from inside begin with the layer's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None


def tensors_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter trains, not copies but of factors that experts share, by its keys in the file."""
    layers, saved = holders_of(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {file_key(name, key): tensor for key, tensor in layer.file_tensors(adapter_name).items()}
    for name, wrapper in saved.items():
        for key, tensor in wrapper.modules_to_save[adapter_name].state_dict().items():
            tensors[file_key(name, plain_key(key))] = tensor
    return tensors | {key: bias.detach() for key, bias in trained_biases(model, adapter_name).items()}


def biases_in(model: nn.Module, which: str, targets: Collection[str]) -> dict[str, nn.Parameter]:
    """The biases of the base model that train with an adapter, by their keys in PEFT's file.

    Args:
        model: with the adapter or before it gets it.
        which: PEFT's `bias`.
        targets: the names of the layers that have the adapter, or will.
    """
    found: dict[str, nn.Parameter] = {}
    for place in walk(model) if which != "none" else ():
        module, name = place.module, place.name
        has = isinstance(module, LoRALayer) or name in targets
        bias = module._parameters.get("bias")
        if isinstance(module, LoRALayer):
            bias = module._pristine_bias if module._pristine_bias is not None else module.base()._parameters.get("bias")
        if bias is not None and not place.inside and (which == "all" or name in targets):
            found[file_key(name, "base_layer.bias" if has else "bias")] = bias
    return found


def biased_adapters(layers: Layers) -> dict[str, str]:
    """PEFT's `bias` of the adapters with which biases of the base train; there should be one."""
    return {name: which for layer in layers.values() for name, which in layer.trains_bias.items() if which != "none"}


def trained_biases(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """`biases_in` of an adapter that the model has."""
    layers = holders_of(model, adapter_name)[0]
    which = next((layer.trains_bias[adapter_name] for layer in layers.values()), "none")
    return biases_in(model, which, layers)


def train_biases(model: nn.Module, adapter_name: str, trains: bool) -> None:
    """Let the biases of the base that belong to an adapter train, or freeze them. Nothing else does either."""
    for bias in trained_biases(model, adapter_name).values():
        set_trainable(bias, trains)


def own_tensors(model: nn.Module, adapter_name: str) -> list[Tensor]:
    """An adapter's tensors as the model holds them, in the order of `tensors_of`."""
    layers, saved = holders_of(model, adapter_name)
    own: list[Tensor] = [tensor for layer in layers.values() for tensor in layer.own_tensors(adapter_name)]
    for wrapper in saved.values():
        own += wrapper.modules_to_save[adapter_name].state_dict(keep_vars=True).values()
    return [*own, *trained_biases(model, adapter_name).values()]


def live_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """The keys of an adapter's tensors in the model's own state dict, in the order of `tensors_of`."""
    own = own_tensors(model, adapter_name)  # before the names: FSDP2 puts its shards in place when asked for state
    names = {id(tensor): plain_key(key) for key, tensor in (*model.named_parameters(), *model.named_buffers())}
    return [names[id(tensor)] for tensor in own]


def file_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """The keys of an adapter's tensors in PEFT's file, in the order of `tensors_of`."""
    return list(tensors_of(model, adapter_name))
