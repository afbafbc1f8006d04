"""LoraConfig, one object that says what an adapter is, and the checks of its values."""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

_LARGEST_RANK = 2**31 - 1


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


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


@dataclass(frozen=True)
class LayerConfig:
    """What an adapter is in one layer. Raises ValueError naming the value that no LoRA layer can have."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self):
        r, alpha, dropout = self.r, self.lora_alpha, self.lora_dropout
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"r must be an int >= 1; got {r!r}")
        if r > _LARGEST_RANK:
            raise ValueError(f"r must be at most {_LARGEST_RANK}; got a number of {r.bit_length()} bits")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= sys.float_info.max:
            got = repr(alpha) if not isinstance(alpha, int) else f"a number of {alpha.bit_length()} bits"
            raise ValueError(f"lora_alpha must be a finite number; got {got}")
        if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"lora_dropout must be a number in [0, 1); got {dropout!r}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be a bool; got {self.use_rslora!r}")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)


def endings(name: str) -> Iterator[str]:
    """A dotted name and its ends after a dot: a.b.c, b.c, c."""
    yield name
    for position, letter in enumerate(name):
        if letter == ".":
            yield name[position + 1 :]


def matches(targets: str | Iterable[str], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a collection (best a set) holds names or their
    ends after a dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(end in targets for end in endings(name))


class NamePatterns:
    """The keys of a rank_pattern or an alpha_pattern, read once, for thousands of names.

    PEFT's rule: a key fits a name if re.match finds `(.*\\.)?(key)$`, and the first key that fits decides. Almost all
    keys are plain names, in which a dot stands for any character; those are found in a dictionary by their length and
    the places of their dots, all others are regular expressions, tried one by one.

    Args:
        keys: regular expressions, in PEFT's order.
    Raises: re.error for a key that is none.
    """

    def __init__(self, keys: Iterable[str]):
        self.keys = list(keys)
        # Whether only a whole name fits, length, places of the dots, text: the keys of that text.
        self._plain: dict[tuple[bool, int], dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._regexes: list[tuple[int, re.Pattern]] = []
        for index, key in enumerate(self.keys):
            plain = _as_plain_name(key)
            if plain is None:
                self._regexes.append((index, re.compile(_for_ends(key))))
                continue
            text, dots = plain
            alike = self._plain.setdefault((key.startswith("^"), len(text)), {})
            alike.setdefault(dots, {}).setdefault(text, []).append(index)

    def fitting(self, name: str) -> list[int]:
        """The places of the keys that fit, the deciding one first."""
        found = [index for index, regex in self._regexes if regex.match(name)]
        for whole, text in ((True, name), *((False, end) for end in endings(name))):
            for dots, keys in self._plain.get((whole, len(text)), {}).items():
                found += keys.get(_with_dots(text, dots), ())
        return sorted(found)


def _as_plain_name(key: str) -> tuple[str, tuple[int, ...]] | None:
    """A key as the text that it stands for and the places in it where a dot stands for any character; None for a
    regular expression beyond that."""
    text = key.removeprefix("^")
    literal = text.replace("\\", "")
    if re.escape(literal) == text:
        return literal, ()
    if re.fullmatch(r"[\w.-]+", text):
        return text, tuple(place for place, letter in enumerate(text) if letter == ".")
    return None


def _for_ends(key: str) -> str:
    """PEFT's regular expression for the names that a key of a pattern fits."""
    return rf"(.*\.)?({key})$"


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    """The text with a dot in each of these places."""
    letters = list(text)
    for place in places:
        letters[place] = "."
    return "".join(letters)


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: the part of PEFT's LoraConfig that this library supports, under the same names.

    Args:
        r, lora_alpha, lora_dropout, use_rslora: as in `LoRALinear`.
        target_modules: "all-linear" for every nn.Linear but the output head, names or their ends after a dot, or a
            regular expression for the whole name.
        rank_pattern, alpha_pattern: r and lora_alpha of layers whose name, or its end after a dot, a key matches as a
            regular expression; the first such key decides.
        modules_to_save: ends of names of modules of which the adapter trains and saves a full copy.
        exclude_modules: as target_modules, what gets no adapter all the same.
    Raises: ValueError naming the field, what was expected and what was given.
    Source: Hugging Face PEFT's LoraConfig.
    """

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
        LayerConfig(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora)
        for name, one_string in (("target_modules", True), ("exclude_modules", True), ("modules_to_save", False)):
            value = getattr(self, name)
            if isinstance(value, list | tuple | set | frozenset):  # a copy of our own, in one order
                value = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
                object.__setattr__(self, name, value)
            strings = isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
            if not strings and not (one_string and isinstance(value, str)):
                raise ValueError(
                    f"{name} must be a list of non-empty str{' or one regular expression' if one_string else ''}; got "
                    f"{value!r}"
                )
            if isinstance(value, str):
                _check_regex(name, value, value)
        for entry in self.modules_to_save:
            _check_regex("modules_to_save entry", entry, _inside_saved(entry))
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} must be a dict from regular expressions to numbers; got {pattern!r}")
            object.__setattr__(self, name, dict(pattern))
            for key, value in pattern.items():
                if _as_plain_name(key) is None:
                    _check_regex(f"{name} key", key, _for_ends(key))
                LayerConfig(r=value) if name == "rank_pattern" else LayerConfig(lora_alpha=value)

    @cached_property
    def ranks(self) -> NamePatterns:
        """The keys of rank_pattern."""
        return NamePatterns(self.rank_pattern)

    @cached_property
    def alphas(self) -> NamePatterns:
        """The keys of alpha_pattern."""
        return NamePatterns(self.alpha_pattern)

    def layer(self, name: str) -> LayerConfig:
        """What the adapter is in the layer of this name."""
        r, lora_alpha = self.r, self.lora_alpha
        for index in self.ranks.fitting(name)[:1]:
            r = self.rank_pattern[self.ranks.keys[index]]
        for index in self.alphas.fitting(name)[:1]:
            lora_alpha = self.alpha_pattern[self.alphas.keys[index]]
        return LayerConfig(r, lora_alpha, self.lora_dropout, self.use_rslora)

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is the word for every nn.Linear but the output head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @cached_property
    def _targets(self) -> str | set[str]:
        return self.target_modules if isinstance(self.target_modules, str) else set(self.target_modules)

    @cached_property
    def _excluded(self) -> str | set[str]:
        return self.exclude_modules if isinstance(self.exclude_modules, str) else set(self.exclude_modules)

    @cached_property
    def _saved(self) -> list[re.Pattern]:
        return [re.compile(_inside_saved(entry)) for entry in self.modules_to_save]

    def targets(self, name: str) -> bool:
        """Whether target_modules, if not "all-linear", names the module of this name."""
        return matches(self._targets, name)

    def excludes(self, name: str) -> bool:
        """Whether exclude_modules or modules_to_save keep LoRA from the module of this name."""
        return matches(self._excluded, name) or any(regex.match(name) for regex in self._saved)


def _inside_saved(entry: str) -> str:
    """PEFT's regular expression for the module that an entry of modules_to_save names and all modules in it."""
    return rf"(^|.*\.){entry}($|\..*)"


def _check_regex(name: str, value: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression; got {value!r} ({error})") from None
