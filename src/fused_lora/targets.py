"""Which modules of a model an adapter sits in, by PEFT's rules, and ModuleToSave, the wrapper of those it trains in
full."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from fused_lora.nn import LoRALinear, check_linear, check_lora_arguments, unknown_name


class ModuleToSave(nn.Module):
    """A frozen module with a trainable full copy for each adapter that asks for one (PEFT's `modules_to_save`).

    Calls and unknown attributes go to the active adapter's copy, or to the original. The original keeps its Parameters,
    so a tied twin (an embedding under a copied output head) is untouched.

    Args:
        original_module: any module with a forward.
    """

    def __init__(self, original_module: nn.Module):
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.merged = False  # inside `merged(model)`: state_dict() is the current module's own
        self.training = original_module.training

    def current(self) -> nn.Module:
        """The module that a call runs."""
        name = self.__dict__["active_adapter"]
        return self._modules["original_module"] if name is None else self._modules["modules_to_save"][name]

    def add_adapter(self, adapter_name: str) -> None:
        """A frozen copy of the original for a new adapter."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)

    def set_adapter(self, adapter_name: str | None) -> None:
        """Make one adapter's copy the one that runs and trains; None is the original."""
        if adapter_name is not None and adapter_name not in self.modules_to_save:
            raise unknown_name("adapter_name", adapter_name, self.modules_to_save)
        for name, module in self.modules_to_save.items():
            for parameter in module.parameters():
                parameter.requires_grad_(name == adapter_name and parameter.is_floating_point())
        self.active_adapter = adapter_name

    def forward(self, *args, **kwargs):
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "active_adapter" not in self.__dict__:  # half-built, in deepcopy or unpickling
                raise
            return getattr(self.current(), name)

    def state_dict(self, *args, **kwargs):
        """As Module.state_dict; inside `merged(model)` that of the module that runs, under the wrapper's own name."""
        return self.current().state_dict(*args, **kwargs) if self.merged else super().state_dict(*args, **kwargs)


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


def matches(targets: str | list[str], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their ends after a
    dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pattern_value(pattern: dict, name: str, default):
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the name or its end after a dot, as a
    regex."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


@dataclass(frozen=True)
class LoraSpec:
    """The part of PEFT's LoraConfig that this library supports, under the same names."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] = "all-linear"
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    exclude_modules: str | list[str] = field(default_factory=list)

    def __post_init__(self):
        check_lora_arguments(self.r, self.lora_alpha, self.lora_dropout)
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be a bool; got {self.use_rslora!r}")
        for name, one_string in (("target_modules", True), ("exclude_modules", True), ("modules_to_save", False)):
            value = getattr(self, name)
            strings = isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
            if not strings and not (one_string and isinstance(value, str)):
                raise ValueError(
                    f"{name} must be a list of non-empty str{' or one regular expression' if one_string else ''}; got "
                    f"{value!r}"
                )
            if isinstance(value, str):
                _check_regex(name, value)
        for entry in self.modules_to_save:
            _check_regex("modules_to_save entry", entry)  # `excludes` reads it so, as PEFT does
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} must be a dict from regular expressions to numbers; got {pattern!r}")
            for key, value in pattern.items():
                _check_regex(f"{name} key", key)
                check_lora_arguments(*((value, 1) if name == "rank_pattern" else (1, value)), 0.0)

    def r_of(self, name: str) -> int:
        """The rank of the layer of this name."""
        return _pattern_value(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """lora_alpha of the layer of this name."""
        return _pattern_value(self.alpha_pattern, name, self.lora_alpha)

    def excludes(self, name: str) -> bool:
        """Whether exclude_modules or modules_to_save keep LoRA from the module of this name."""
        return matches(self.exclude_modules, name) or any(
            re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in self.modules_to_save
        )


def _check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression; got {value!r} ({error})") from None


@dataclass(frozen=True)
class Plan:
    """What an adapter will sit in: modules by the first name they are reached by, and all places of the model."""

    linears: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    places: list[Place]


def make_plan(model: nn.Module, spec: LoraSpec, strict: bool) -> Plan:
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


def _find_linears(model: nn.Module, spec: LoraSpec, places: list[Place], first: dict[int, str]) -> dict[str, nn.Module]:
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


def _check_all_used(spec: LoraSpec, linears: dict, saved: dict, places: list[Place]) -> None:
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
