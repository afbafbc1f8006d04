"""LoraConfig, one object that says what an adapter is, and the checks of its values."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn


def unknown_name(what: str, got: str | None, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among `known`, with the nearest of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(got), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{what} must be one of {known}; got {got!r}{hint}")


def check_adapter_name(name: str) -> None:
    """Raises ValueError unless `name` can be a key of ParameterDict and ModuleDict, which refuse dots and their own
    attributes."""
    usable = isinstance(name, str) and name != "" and "." not in name
    if (
        not usable
        or hasattr(nn.ParameterDict, name)
        or name in vars(nn.ParameterDict())
        or hasattr(nn.ModuleDict, name)
    ):
        raise ValueError(
            f"adapter_name must be a non-empty str without dots that is no attribute of torch.nn.Module; got {name!r}"
        )


def check_lora_arguments(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raises ValueError naming the argument that no LoRA layer can have."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be an int >= 1; got {r!r}")
    if not isinstance(lora_alpha, int | float) or isinstance(lora_alpha, bool) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number; got {lora_alpha!r}")
    if not isinstance(lora_dropout, int | float) or isinstance(lora_dropout, bool) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be a number in [0, 1); got {lora_dropout!r}")


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


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
class LoraConfig:
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
