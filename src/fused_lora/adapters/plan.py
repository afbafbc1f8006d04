"""Which modules of a model an adapter sits in, by PEFT's rules, and ModuleToSave, the wrapper of those it trains in
full."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fused_lora.config import LoraConfig, matches, unknown_name
from fused_lora.nn.linear import LoRALinear, check_linear
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


def walk(parent: nn.Module, prefix: str = "", inside: bool = False) -> Iterator[Place]:
    """Every place under `parent` in the order of `named_modules`, a shared module as often as it is reached;
    LoRALinears are leaves and a ModuleToSave shows the original under its own name."""
    for attribute, module in parent._modules.items():
        if module is None:
            continue
        name = f"{prefix}{attribute}"
        yield Place(name, module, parent, attribute, inside)
        if isinstance(module, ModuleToSave):
            yield from walk(module.original_module, f"{name}.", True)
        elif not isinstance(module, LoRALinear):
            yield from walk(module, f"{name}.", inside)


@dataclass(frozen=True)
class Plan:
    """What an adapter will sit in: modules by the first name they are reached by, and all places of the model."""

    linears: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    places: list[Place]


def make_plan(model: nn.Module, spec: LoraConfig, strict: bool) -> Plan:
    """Find the modules that `spec` names, changing nothing.

    Args:
        model: the model.
        spec: what to find.
        strict: whether a name of target_modules, modules_to_save or a pattern that fits no module is an error.
    Raises: ValueError if a target is no nn.Linear, nothing is found, or the two kinds overlap.
    """
    places = list(walk(model))
    first: dict[int, str] = {}
    for place in places:
        first.setdefault(id(place.module), place.name)
    saved = {
        first[id(p.module)]: p.module
        for p in places
        if not p.inside and any(p.name.endswith(end) for end in spec.modules_to_save)
    }
    linears = _find_linears(model, spec, places, first)
    for name, module in saved.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise ValueError(f"modules_to_save must name modules with a forward; got {name}, a {type(module).__name__}")
        if any(
            isinstance(inner, LoRALinear) or (inner is not module and isinstance(inner, ModuleToSave))
            for inner in module.modules()
        ):
            raise ValueError(
                f"modules_to_save must name modules without adapters in them; got {name}, which holds some"
            )
        for linear in linears:
            if linear == name or linear.startswith(f"{name}."):
                raise ValueError(
                    f"modules_to_save and target_modules must not overlap; got {name} in the first and {linear} in the "
                    "second"
                )
    if strict:
        _check_all_used(spec, linears, saved, places)
    return Plan(linears, saved, places)


def _find_linears(
    model: nn.Module, spec: LoraConfig, places: list[Place], first: dict[int, str]
) -> dict[str, nn.Module]:
    """Every nn.Linear or LoRALinear that target_modules names, each once."""
    targets = spec.target_modules
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    head = model.get_output_embeddings() if all_linear and hasattr(model, "get_output_embeddings") else None
    found = {}
    for place in places:
        name, module = place.name, place.module
        if place.inside or spec.excludes(name):
            continue
        if all_linear:
            hit = module is not head and (type(module) is nn.Linear or isinstance(module, LoRALinear))
        else:
            hit = matches(targets, name)
        if hit:
            if not isinstance(module, LoRALinear):
                try:
                    check_linear(module)
                except ValueError as error:
                    raise ValueError(f"target {name}: {error}") from None
            found[first[id(module)]] = module
    if not found:
        known = {
            place.name.rpartition(".")[2]
            for place in places
            if type(place.module) is nn.Linear or isinstance(place.module, LoRALinear)
        }
        if isinstance(targets, list) and targets:
            raise unknown_name("target_modules", targets[0], known)
        rule = "'all-linear' or" if all_linear else "a list of names, or, being a string,"
        raise ValueError(
            f"target_modules must be {rule} a regular expression for the whole name of torch.nn.Linear modules, which "
            "end in "
            f"{sorted(known)}; got {targets!r}, which finds none"
        )
    return found


def _check_all_used(spec: LoraConfig, linears: dict, saved: dict, places: list[Place]) -> None:
    """Raises ValueError for a name or pattern that found nothing: a typing error, most likely."""
    ends = {
        place.name.rpartition(".")[2]
        for place in places
        if type(place.module) is nn.Linear or isinstance(place.module, LoRALinear)
    }
    names = [place.name for place in places]
    for target in spec.target_modules if isinstance(spec.target_modules, list) else []:
        if not any(matches([target], name) for name in names):
            raise unknown_name("target_modules", target, ends)
    for target in spec.modules_to_save:
        if not any(name.endswith(target) for name in saved):
            raise unknown_name("modules_to_save", target, {name.rpartition(".")[2] for name in names})
    for kind, pattern in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for key in pattern:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in linears):
                raise unknown_name(f"a key of {kind}", key, {name.rpartition(".")[2] for name in linears})
