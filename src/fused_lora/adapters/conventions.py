"""What a configuration leaves to the model that it is for, by PEFT's conventions: which modules are a classification
head, and where transformers keeps what were linear layers of experts once."""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from torch import nn

from fused_lora.adapters.places import Place, is_linear_layer, walk
from fused_lora.adapters.wrappers import plain_class, unwrapped
from fused_lora.config import LoraConfig
from fused_lora.name_patterns import endings
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.modules_to_save import ModuleToSave

# The heads that PEFT trains in full, by task type, and the classes of transformers that have them.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_CLASSES = {
    "TOKEN_CLS": r".*ForTokenClassification",
    "SEQ_CLS": r".*For(\w*Classification|MultipleChoice)",
    "QUESTION_ANS": r".*ForQuestionAnswering",
}
# Linear layers of transformers 4 that are parameters in transformers 5, by the family of models, and which of them are
# one parameter together.
_EXPERTS = {
    "mixtral": {"gate": "weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {"gate": "weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
}
_FUSED = "gate_up_proj"


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's task type of a model with a head, by its class."""
    name = plain_class(unwrapped(model)).__name__
    return next((task_type for task_type, regex in _CLASSES.items() if re.fullmatch(regex, name)), None)


def moved_layers(model: nn.Module) -> dict[str, str]:
    """The last parts of names of linear layers which PEFT takes for parameters of the experts in this model."""
    kind = getattr(getattr(unwrapped(model), "config", None), "model_type", "")
    families = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    return _EXPERTS.get("mixtral" if kind == "mixtral" else families.get(kind, ""), {})


def for_model(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration with the model's head among modules_to_save, and its experts among target_parameters where
    target_modules is "all-linear" or names what they were before they were fused.

    Raises: ValueError if of two layers that are one parameter only one is named.
    """
    places = [place for place in walk(model) if not place.inside]
    return _with_experts(_with_head(config, model, places), model, places)


def with_stored_head(config: LoraConfig, model: nn.Module, stored: Callable[[], Collection[str]]) -> LoraConfig:
    """The configuration of a file with the model's head among modules_to_save where the file holds it: older releases
    of PEFT trained and wrote the head of a task_type without saying so.

    Args:
        config: a file's.
        model: the base model.
        stored: gives the names in the base model of what the file holds.
    """
    if config.modules_to_save or config.task_type not in _HEADS:
        return config
    told = _with_head(config, model, [place for place in walk(model) if not place.inside])
    heads = tuple(f"{name}." for name in told.modules_to_save)
    return told if heads and any(name.startswith(heads) for name in stored()) else config


def _with_head(config: LoraConfig, model: nn.Module, places: list[Place]) -> LoraConfig:
    task_type = config.task_type or task_type_of(model)
    ends = tuple(_HEADS.get(task_type or "", ()))
    lists = nn.ModuleList | nn.ModuleDict  # nothing calls these
    heads = [p.name for p in places if ends and p.name.endswith(ends) and not isinstance(p.module, lists)]
    heads = [name for name in heads if not config.excludes(name)]
    if not heads:
        return config
    if config.task_type is None and not config.all_linear:
        modules = {place.name: place.module for place in places}
        if any(_stays_fresh(modules[name], name, config) for name in heads):
            warnings.warn(
                f"{', '.join(heads)}: the head of {plain_class(model).__name__} stays frozen as it is; if it is new, "
                f"train it too, by task_type={task_type!r} or modules_to_save={heads}",
                stacklevel=4,
            )
        return config
    return replace(config, modules_to_save=[*config.modules_to_save, *heads], task_type=task_type)


def _stays_fresh(head: nn.Module, name: str, config: LoraConfig) -> bool:
    """Whether neither an adapter nor a copy is to be in a head."""
    if isinstance(head, LoRALayer | ModuleToSave):
        return False
    inner = (f"{name}.{path}" if path else name for path, _ in head.named_modules())
    return not any(config.targets(path) for path in inner)


def _with_experts(config: LoraConfig, model: nn.Module, places: list[Place]) -> LoraConfig:
    moved = moved_layers(model)
    found = [key for place in places if moved for key in _expert_parameters(place, moved, config)]
    if not found:
        return config
    changes: dict = {"target_parameters": [*config.target_parameters, *found]}
    if any(key.endswith(_FUSED) for key in found):  # two layers of rank r side by side
        key = rf".*\.{_FUSED}"
        changes["rank_pattern"] = config.rank_pattern | {key: 2 * config.r}
        changes["alpha_pattern"] = config.alpha_pattern | {key: 2 * config.lora_alpha}
    # A router that is a linear layer still has its adapter as ever.
    fused = {old for old, new in moved.items() if new != "weight"}
    dense = [p.name for p in places if is_linear_layer(p.module) and _last(p.name) in fused]
    if config.all_linear and dense:
        given = config.exclude_modules
        one = "|".join([given, *(re.escape(name) for name in dense)]) if isinstance(given, str) else [*given, *dense]
        changes["exclude_modules"] = one
        warnings.warn(
            f"'all-linear' leaves out {', '.join(sorted({_last(name) for name in dense}))} of the dense layers of "
            f"{plain_class(model).__name__}, as in PEFT, where these names stand for the experts; name them in "
            "target_modules to adapt them",
            stacklevel=4,
        )
    elif isinstance(config.target_modules, list):
        linears = [p.name for p in places if is_linear_layer(p.module)]
        there = {end for name in linears for end in endings(name)}
        changes["target_modules"] = [t for t in config.target_modules if t in there or _last(t) not in moved]
    return replace(config, **changes)


def _expert_parameters(place: Place, moved: dict[str, str], config: LoraConfig) -> Iterator[str]:
    """The names of the parameters of a module for which target_modules names the layers that they were."""
    own = dict(place.module.named_parameters(recurse=False))
    if config.excludes(place.name) or isinstance(place.module, LoRALayer) or is_linear_layer(place.module):
        return
    is_router = _last(place.name) == "gate" and "gate" in moved
    for parameter in ("weight",) if is_router else (_FUSED, "down_proj"):
        layers = [old for old, new in moved.items() if new == parameter]
        named = [old for old in layers if _names(config, place.name if is_router else f"{place.name}.{old}")]
        if parameter in own and named:
            if named != layers:
                raise ValueError(
                    f"target_modules must name all of {layers} or none, they are one parameter, {parameter}, of "
                    f"{place.name}; got {named}"
                )
            yield f"{place.name}.{parameter}"


def _names(config: LoraConfig, name: str) -> bool:
    return config.in_layers(name) if config.all_linear else config.targets(name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
