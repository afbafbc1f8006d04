"""Every place of a model at which a module is reached, under the plain model's names."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fused_lora.adapters.wrappers import inner_attribute, unwrapped
from fused_lora.nn.base_linear import is_linear
from fused_lora.nn.experts import LoRAParameter, module_name
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.modules_to_save import ModuleToSave


@dataclass(frozen=True)
class Place:
    """One way to reach a module: parent.attribute is module, called `name` from the root. `inside` a ModuleToSave
    nothing is replaced."""

    name: str
    module: nn.Module
    parent: nn.Module
    attribute: str
    inside: bool


def walk(model: nn.Module) -> Iterator[Place]:
    """Every place of a model in the order of `named_modules`, a shared module as often as it is reached.

    Layers with adapters are leaves, a ModuleToSave shows the original under its own name, a wrapper the module in it.
    The module in a LoRAParameter has that one's name, a LoRAParameter in another PEFT's, with ".base_layer".
    """
    reached: dict[str, tuple[nn.Module, str, bool]] = {}  # what may hold places: module, plain name, inside
    for path, module in unwrapped(model).named_modules(remove_duplicate=False):
        if not path:
            reached[path] = (module, "", False)
            continue
        holder_path, _, attribute = path.rpartition(".")
        if holder_path not in reached:
            continue
        holder, name, inside = reached[holder_path]
        if isinstance(holder, ModuleToSave):
            if attribute == "original_module":
                reached[path] = (module, name, True)
            continue
        if isinstance(holder, LoRAParameter):
            if attribute != "base_layer":
                continue
            name = f"{name}.base_layer" if isinstance(module, LoRAParameter) else module_name(name)
        elif attribute != inner_attribute(holder):
            name = f"{name}.{attribute}" if name else attribute
        if not isinstance(module, LoRALayer) or isinstance(module, LoRAParameter):
            reached[path] = (module, name, inside)
        if inner_attribute(module) is None:
            yield Place(name, module, holder, attribute, inside)


def parameter_names(place: Place) -> list[str]:
    """The names of the parameters of the base model that are a module's own."""
    if isinstance(place.module, LoRAParameter):
        return []
    return [f"{place.name}.{name}" for name, _ in place.module.named_parameters(recurse=False)]


def is_linear_layer(module: nn.Module) -> bool:
    """Whether "all-linear" means a module, with adapters or without."""
    return is_linear(module) or isinstance(module, LoRALinear)
