"""Which modules of a model an adapter sits in, by PEFT's rules, under the plain model's names."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fused_lora.adapters.parameters import PlainParameter, find_parameters
from fused_lora.adapters.places import Place, is_linear_layer, parameter_names, walk
from fused_lora.adapters.saved import Saved, find_saved
from fused_lora.adapters.weight_readers import reader_of
from fused_lora.adapters.wrappers import unwrapped
from fused_lora.config import LoraConfig, unknown_name
from fused_lora.deepspeed_zero import is_split
from fused_lora.name_patterns import endings
from fused_lora.nn import LoRALayer, check_base, layer_class
from fused_lora.nn.experts import LoRAParameter, pattern_name
from fused_lora.nn.modules_to_save import ModuleToSave


@dataclass(frozen=True)
class Plan:
    """What an adapter will sit in: modules by the first name they are reached by, and all places of the model.
    Parameters by the names of their LoRAParameters, the inner of a module's first."""

    linears: dict[str, nn.Module]
    saved: Saved
    places: list[Place]
    parameters: dict[str, LoRAParameter | PlainParameter]


def make_plan(model: nn.Module, config: LoraConfig, strict: bool) -> Plan:
    """Find the modules that `config` names, changing nothing.

    Args:
        model: the model, in wrappers or not.
        config: what to find.
        strict: whether a name of target_modules, modules_to_save or a pattern that fits no module is an error.
    Raises: ValueError if a target can hold no adapter, nothing is found, or the two kinds overlap.
    """
    places = list(walk(model))
    first: dict[int, str] = {}
    for place in places:
        first.setdefault(id(place.module), place.name)
    saved = find_saved(unwrapped(model), config, places, first)
    parameters = find_parameters(config, places, first) if config.target_parameters else {}
    linears = _find_linears(unwrapped(model), config, places, first)
    linears = _without_unread(unwrapped(model), linears, config, places)
    _check_variant(linears, parameters, config)
    if not linears and not parameters:
        raise _found_nothing(config, places)
    _check_saved(saved, [*linears, *parameters])
    _check_not_diffusers(unwrapped(model), [*linears, *parameters])
    _check_tying(config, linears, saved, places)
    if strict:
        _check_all_used(config, linears, saved.modules, parameters, places)
        if config.exclude_modules and not any(config.names_excluded(place.name) for place in places):
            warnings.warn(f"exclude_modules={config.exclude_modules!r} excludes no module of the model", stacklevel=4)
    _check_reachable(linears, saved.modules, places)
    return Plan(linears, saved, places, parameters)


def _find_linears(
    model: nn.Module, config: LoraConfig, places: list[Place], first: dict[int, str]
) -> dict[str, nn.Module]:
    """Every layer that target_modules names, each once."""
    get_head = getattr(model, "get_output_embeddings", None) if config.all_linear else None
    head = unwrapped(get_head()) if get_head is not None and get_head() is not None else None
    found: dict[str, nn.Module] = {}
    for place in places:
        name, module = place.name, place.module
        if place.inside:
            continue
        if config.excludes(name):
            hit = False
        elif config.all_linear:
            hit = module is not head and is_linear_layer(module) and config.in_layers(name)
        else:
            hit = config.targets(name) and not isinstance(module, LoRAParameter)
        if hit or (is_linear_layer(module) and config.targets_parameter(f"{name}.weight")):
            if not isinstance(module, LoRALayer):
                try:
                    check_base(module)
                except ValueError as error:
                    raise ValueError(f"target_modules: target {name}: {error}") from None
            found[first[id(module)]] = module
    return found


def _check_variant(linears: dict[str, nn.Module], parameters: dict, config: LoraConfig) -> None:
    """Raises ValueError naming a target that can have plain LoRA only, if that is not what is wanted."""
    for name, module in linears.items():
        kind, base = layer_class(module), module
        if isinstance(module, LoRALayer):
            base = module.base()
        else:
            kind = kind.kind_for(base)
        try:
            kind.check_variant(base, config.layer(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, target in parameters.items():
        try:
            LoRAParameter.check_variant(target.module, config.layer(pattern_name(name, target)))
        except ValueError as error:
            raise ValueError(f"{pattern_name(name, target)}: {error}") from None


def _found_nothing(config: LoraConfig, places: list[Place]) -> ValueError:
    targets = config.target_modules
    known = {place.name.rpartition(".")[2] for place in places if is_linear_layer(place.module)}
    if isinstance(targets, list) and targets:
        return unknown_name("target_modules", targets[0], known)
    if config.all_linear and config.layers_to_transform is not None:
        return ValueError(
            "layers_to_transform must be numbers of layers that hold linear layers, in names with a number as "
            f"layers.0.; got {config.layers_to_transform!r}, which leaves none of those that end in {sorted(known)}"
        )
    if config.all_linear:
        return ValueError(
            "model must have linear layers beside its output head, which target_modules='all-linear' leaves out; its "
            f"linear layers end in {sorted(known)}"
        )
    return ValueError(
        "target_modules must be a list of names, or, being a string, a regular expression for the whole name of linear "
        f"layers, which end in {sorted(known)}; got {targets!r}, which finds none"
    )


def _check_not_diffusers(root: nn.Module, targets: list[str]) -> None:
    """Raises ValueError for a target in a model of diffusers, whose `scale` of a call, `disable_lora` and the like find
    PEFT's layers and would pass by ours without a word."""
    for name, module in root.named_modules():
        if any(kind.__module__ == "diffusers.loaders.peft" for kind in type(module).__mro__):
            inside = [target for target in targets if target.startswith(f"{name}." if name else "")]
            if inside:
                raise ValueError(
                    "target_modules must leave out models of diffusers, which scales and switches the layers of PEFT "
                    "alone: model.add_adapter(config), then fused_lora.peft.fuse(model); got "
                    f"{inside[0]} in a {type(module).__name__}"
                )


def _check_saved(saved: Saved, adapted: list[str]) -> None:
    """Raises ValueError for a module that cannot be copied and called in another's place, or that holds adapters."""
    for name, module in saved.modules.items():
        if any(is_split(parameter) for parameter in module.parameters()):
            raise ValueError(
                "modules_to_save and trainable_token_indices must name modules with whole weights, so load the model "
                f"outside of deepspeed.zero.Init; got {name}, which ZeRO-3 has split"
            )
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise ValueError(f"modules_to_save must name modules with a forward; got {name}, a {type(module).__name__}")
        if any(
            isinstance(inner, LoRALayer) or (inner is not module and isinstance(inner, ModuleToSave))
            for inner in module.modules()
        ):
            raise ValueError(
                f"modules_to_save must name modules without adapters in them; got {name}, which holds some"
            )
        for linear in adapted:
            if linear == name or linear.startswith(f"{name}."):
                what = "trainable_token_indices" if name in saved.rows else "modules_to_save"
                tied = f", tied to {saved.ties[name]}," if name in saved.ties else ""
                raise ValueError(
                    f"{what} and target_modules must not overlap; got {name}{tied} in the first and {linear} in the "
                    "second"
                )


def _check_tying(config: LoraConfig, linears: dict, saved: Saved, places: list[Place]) -> None:
    """Raises ValueError if the adapters of target_modules would have to be tied; warns if nothing is."""
    for name, module in linears.items() if config.ensure_weight_tying else ():
        weight = module._parameters.get("weight")
        tied = [p.name for p in places if p.module is not module and p.module._parameters.get("weight") is weight]
        if weight is not None and tied:
            raise ValueError(
                "ensure_weight_tying must be False with a tied module among target_modules: PEFT trains its factors "
                "twice, as two parameters over one memory; let PEFT make the adapter, and fuse it; got "
                f"{name}, tied to {', '.join(tied)}"
            )
    if config.ensure_weight_tying and not saved.ties:
        warnings.warn("ensure_weight_tying: no other module has the weight of one that trains", stacklevel=4)


def _check_reachable(linears: dict, saved: dict, places: list[Place]) -> None:
    """Raises ValueError for a module that torch.compile has wrapped by itself: it would go on to call the old one."""
    wanted = {id(module) for module in (*linears.values(), *saved.values())}
    for place in places:
        has_place = isinstance(place.module, LoRALayer | ModuleToSave)
        if place.attribute == "_orig_mod" and id(place.module) in wanted and not has_place:
            raise ValueError(
                f"{place.name} must not be compiled by itself before it gets an adapter: apply_lora first, then "
                "torch.compile; got a compiled one"
            )


def _without_unread(model: nn.Module, linears: dict, config: LoraConfig, places: list[Place]) -> dict:
    """The targets without those whose weight is read by code that never calls them, which "all-linear" leaves out, and
    says so. Raises: ValueError for such targets that are named."""
    modules = {"": model} | {place.name: place.module for place in places}
    readers: dict[tuple[str, str], None] = {}
    called = dict(linears)
    for place in places if config.all_linear else []:
        if isinstance(place.parent, nn.MultiheadAttention) and not config.excludes(place.name):
            readers[place.attribute, "MultiheadAttention"] = None
    for target in linears:
        around = ["", *_around(target)]
        reader = reader_of(target, [(name, modules[name]) for name in around if name in modules])
        if reader is not None:
            readers[target.rpartition(".")[2], reader] = None
            del called[target]
    if readers:
        listed = ", ".join(f"{name} of {reader}" for name, reader in readers)
        why = "code there reads the layer's weight itself and would pass by the adapter"
        if not config.all_linear:
            raise ValueError(
                f"target_modules must leave out {listed}: {why}; name the other targets, or exclude_modules"
            )
        warnings.warn(f"'all-linear' leaves out {listed}: {why}", stacklevel=4)
    return called


def _around(name: str) -> Iterator[str]:
    """The names of the modules around one: a, a.b for a.b.c."""
    for position, letter in enumerate(name):
        if letter == ".":
            yield name[:position]


def _check_all_used(config: LoraConfig, linears: dict, saved: dict, parameters: dict, places: list[Place]) -> None:
    """Raises ValueError for a name or pattern that found nothing: a typing error, most likely."""
    ends = {place.name.rpartition(".")[2] for place in places if is_linear_layer(place.module)}
    reached = {end for place in places for end in endings(place.name)}
    for target in config.target_modules if isinstance(config.target_modules, list) else []:
        if target not in reached:
            raise unknown_name("target_modules", target, ends)
    for target in config.modules_to_save:
        if not any(name.endswith(target) for name in saved):
            raise unknown_name("modules_to_save", target, {place.name.rpartition(".")[2] for place in places})
    names = {key for place in places for key in parameter_names(place)} if config.target_parameters else set()
    reachable = {end for name in names for end in endings(name)}
    for target in config.target_parameters:
        if target not in reachable:
            raise unknown_name("target_parameters", target, {".".join(name.split(".")[-2:]) for name in names})
    adapted = [*map(config.pattern_name, linears), *(pattern_name(name, target) for name, target in parameters.items())]
    for kind, patterns in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        used = {index for name in adapted for index in patterns.fitting(name)}
        for index, key in enumerate(patterns.keys):
            if index not in used:
                raise unknown_name(f"a key of {kind}", key, {name.rpartition(".")[2] for name in adapted})
