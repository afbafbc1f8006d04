"""LoraConfig, one object that says what an adapter is in a model, and the checks of its values."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from fused_lora.layer_config import LayerConfig
from fused_lora.name_patterns import NamePatterns, as_plain_name, check_regex, for_ends, layer_number, matches

STARTS_OF_WEIGHTS = ("pissa", "olora")  # which take the adapter out of the base weight, the same at every time
_STARTS = ("gaussian", "orthogonal", *STARTS_OF_WEIGHTS)
_OTHER_STARTS = {  # PEFT's, and what they need beside the model
    "eva": "batches of data",
    "corda": "batches of data",
    "lora_ga": "gradients of a loss",
    "loftq": "a base that it quantises",
}
_BIASES = ("none", "all", "lora_only")
_TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


def unknown_name(what: str, got: str | None, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among `known`, with the nearest of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(got), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{what} must be one of {known}; got {got!r}{hint}")


def check_adapter_name(name: str) -> None:
    """Raises ValueError unless `name` can be a key of ParameterDict and ModuleDict, which refuse dots and their own
    attributes, and a folder's name, under which several adapters of a model are saved."""
    usable = isinstance(name, str) and name != "" and not set(name) & set("./\\\0")
    if (
        not usable
        or hasattr(nn.ParameterDict, name)
        or name in vars(nn.ParameterDict())
        or hasattr(nn.ModuleDict, name)
    ):
        raise ValueError(
            "adapter_name must be a non-empty str without dots and slashes that is no attribute of torch.nn.Module; "
            f"got {name!r}"
        )


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: the part of PEFT's LoraConfig that this library supports, under the same names.

    Args:
        r, lora_alpha, lora_dropout, use_rslora: as in `LoRALinear`.
        target_modules: "all-linear" for every linear layer but the output head, names or their ends after a dot, or a
            regular expression for the whole name.
        rank_pattern, alpha_pattern: r and lora_alpha of layers whose name, or its end after a dot, a key matches as a
            regular expression; the first such key decides.
        modules_to_save: ends of names of modules of which the adapter trains and saves a full copy.
        exclude_modules: as target_modules, what gets no adapter all the same.
        target_parameters: names or their ends after a dot of Parameters that modules read themselves, such as the fused
            experts of a mixture or its router: [E, out, in], or [out, in]. A linear layer's weight is that layer.
        layers_to_transform: numbers of the only layers in which target_modules, "all-linear" or a list of ends of
            names, get an adapter; the number is the first in a name.
        layers_pattern: the attribute of the list that these numbers count in, where it is not the first.
        task_type: "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" put the head of such a model, classifier, score or
            qa_outputs, among modules_to_save; other types of PEFT's change nothing. None, with "all-linear", does so
            for a model whose class says what it is for.
        trainable_token_indices: numbers of tokens whose vectors train by themselves, in the model's input embedding, or
            by the ends of names of embeddings. Modules tied to such an embedding, an output head, follow it.
        ensure_weight_tying: let modules that are tied to one of modules_to_save have its copy, too; of
            trainable_token_indices it asks that tied modules have the same.
        bias: which biases of the base train with the adapter, in place: "none", with "lora_only" those of the layers
            that have the adapter, or "all". One adapter of a model can train them; when it goes they stay, frozen.
        init_lora_weights: True for a random A and a zero B, "gaussian" for another random A, False for a random B as
            well; by PEFT, if it is installed, "orthogonal", and "pissa" and "olora", which take A and B out of the base
            weights and leave the rest in them.
        use_dora, dora_exact, allora_eta, allora_mode, lora_bias: as in `LoRALinear`.
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
    target_parameters: list[str] = field(default_factory=list)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    task_type: str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True
    use_dora: bool = False
    dora_exact: bool = False
    allora_eta: float | None = None
    allora_mode: str = "gradient"
    bias: str = "none"
    lora_bias: bool = False

    def __post_init__(self):
        object.__setattr__(self, "lora_alpha", self._layer(self.r, self.lora_alpha).lora_alpha)
        self._check_names()
        self._check_patterns()
        self._check_layers()
        self._check_tokens()
        task_type = getattr(self.task_type, "value", self.task_type)  # of PEFT's enumeration
        if task_type is not None and task_type not in _TASK_TYPES:
            raise unknown_name("task_type", task_type, _TASK_TYPES)
        object.__setattr__(self, "task_type", task_type)
        if self.bias not in _BIASES:
            raise unknown_name("bias", self.bias, _BIASES)
        if self.bias != "none" and self.target_parameters:
            given = f"{self.bias!r} and {self.target_parameters!r}"
            raise ValueError(f"bias and target_parameters exclude each other; got {given}")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"lora_bias must be False with init_lora_weights={self.init_lora_weights!r}; got True")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights not in _STARTS:
            needs = _OTHER_STARTS.get(self.init_lora_weights) if isinstance(self.init_lora_weights, str) else None
            why = f", which needs {needs}: let PEFT make the adapter, and fuse it" if needs else ""
            raise ValueError(
                f"init_lora_weights must be a bool or one of {_STARTS}; got {self.init_lora_weights!r}{why}"
            )

    def _check_names(self) -> None:
        """Check the lists of names and take copies of them."""
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            one_string = name in ("target_modules", "exclude_modules")
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
                check_regex(name, value, value)
        for entry in self.modules_to_save:
            check_regex("modules_to_save entry", entry, _inside_saved(entry))

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} must be a dict from regular expressions to numbers; got {pattern!r}")
            object.__setattr__(self, name, dict(pattern))
            for key, value in pattern.items():
                if as_plain_name(key) is None:
                    check_regex(f"{name} key", key, for_ends(key))
                given = {"r": value, "use_dora": self.use_dora} if name == "rank_pattern" else {"lora_alpha": value}
                LayerConfig(**given)

    def _check_layers(self) -> None:
        layers, patterns = self.layers_to_transform, self.layers_pattern
        listed = [layers] if isinstance(layers, int) else layers
        if listed is not None and not (
            isinstance(listed, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in listed)
        ):
            raise ValueError(f"layers_to_transform must be an int or a list of int; got {layers!r}")
        listed_patterns = [patterns] if isinstance(patterns, str) else patterns or []
        if not isinstance(listed_patterns, list | tuple) or not all(isinstance(p, str) and p for p in listed_patterns):
            raise ValueError(f"layers_pattern must be a non-empty str or a list of such; got {patterns!r}")
        if listed and isinstance(self.target_modules, str) and not self.all_linear:
            raise ValueError(
                "layers_to_transform must be None where target_modules is a regular expression, which can say it "
                f"itself; got {layers!r}"
            )
        if listed_patterns and not listed:
            raise ValueError(f"layers_pattern must be None without layers_to_transform; got {patterns!r}")
        for pattern in listed_patterns:
            check_regex("layers_pattern", pattern, layer_number(pattern))

    def _check_tokens(self) -> None:
        """Check the numbers of tokens and take copies of them."""
        given = self.trainable_token_indices
        named = given if isinstance(given, dict) else {} if given is None else {"": given}
        for name, rows in named.items():
            whole = isinstance(rows, list | tuple) and all(type(row) is int and row >= 0 for row in rows)
            if not isinstance(name, str) or not whole or not rows or len(set(rows)) != len(rows):
                raise ValueError(
                    "trainable_token_indices must be a list of different int >= 0, or a dict of such by ends of names; "
                    f"got {given!r}"
                )
        if given is not None:
            copied = {name: list(rows) for name, rows in named.items()}
            object.__setattr__(self, "trainable_token_indices", copied if isinstance(given, dict) else copied[""])
        if not isinstance(self.ensure_weight_tying, bool):
            raise ValueError(f"ensure_weight_tying must be a bool; got {self.ensure_weight_tying!r}")

    @cached_property
    def ranks(self) -> NamePatterns:
        """The keys of rank_pattern."""
        return NamePatterns(self.rank_pattern)

    @cached_property
    def alphas(self) -> NamePatterns:
        """The keys of alpha_pattern."""
        return NamePatterns(self.alpha_pattern)

    def pattern_name(self, name: str) -> str:
        """The name by which the patterns know a layer: a linear layer may be in target_parameters by its weight."""
        return f"{name}.weight" if self.targets_parameter(f"{name}.weight") else name

    def layer(self, name: str) -> LayerConfig:
        """What the adapter is in the layer of this name."""
        r, lora_alpha, name = self.r, self.lora_alpha, self.pattern_name(name)
        for index in self.ranks.fitting(name)[:1]:
            r = self.rank_pattern[self.ranks.keys[index]]
        if self.allora_eta is not None:
            lora_alpha = r
        for index in self.alphas.fitting(name)[:1]:
            lora_alpha = self.alpha_pattern[self.alphas.keys[index]]
        return self._layer(r, lora_alpha)

    def _layer(self, r: int, lora_alpha: float) -> LayerConfig:
        same = ("lora_dropout", "use_rslora", "use_dora", "dora_exact", "allora_eta", "allora_mode", "lora_bias")
        return LayerConfig(r, lora_alpha, **{name: getattr(self, name) for name in same})

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is the word for every linear layer but the output head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @cached_property
    def _targets(self) -> str | set[str]:
        return self.target_modules if isinstance(self.target_modules, str) else set(self.target_modules)

    @cached_property
    def _parameters(self) -> set[str]:
        return set(self.target_parameters)

    @cached_property
    def _excluded(self) -> str | set[str]:
        return self.exclude_modules if isinstance(self.exclude_modules, str) else set(self.exclude_modules)

    @cached_property
    def _saved(self) -> list[re.Pattern]:
        return [re.compile(_inside_saved(entry)) for entry in self.modules_to_save]

    @cached_property
    def _numbered(self) -> tuple[list[re.Pattern], set[int]] | None:
        """The expressions that find a layer's number in a name, and the numbers of layers_to_transform."""
        layers, patterns = self.layers_to_transform, self.layers_pattern
        listed: Sequence[str | None] = [patterns] if isinstance(patterns, str) else patterns or [None]
        numbers = {layers} if isinstance(layers, int) else set(layers or ())
        return ([re.compile(layer_number(pattern)) for pattern in listed], numbers) if numbers else None

    def in_layers(self, name: str) -> bool:
        """Whether layers_to_transform, if given, has the number in this name."""
        if self._numbered is None:
            return True
        found = next((match for regex in self._numbered[0] if (match := regex.match(name))), None)
        return found is not None and int(found["number"]) in self._numbered[1]

    def targets(self, name: str) -> bool:
        """Whether target_modules, if not "all-linear", and layers_to_transform name the module of this name; a whole
        name is not asked for its number."""
        whole = isinstance(self._targets, set) and name in self._targets
        return whole or (matches(self._targets, name) and self.in_layers(name))

    def targets_parameter(self, name: str) -> bool:
        """Whether target_parameters names the parameter of this name."""
        return matches(self._parameters, name)

    def names_excluded(self, name: str) -> bool:
        """Whether exclude_modules names the module of this name."""
        return matches(self._excluded, name)

    def excludes(self, name: str) -> bool:
        """Whether exclude_modules or modules_to_save keep LoRA from the module of this name."""
        return self.names_excluded(name) or any(regex.match(name) for regex in self._saved)


def _inside_saved(entry: str) -> str:
    """PEFT's regular expression for the module that an entry of modules_to_save names and all modules in it."""
    return rf"(^|.*\.){entry}($|\..*)"
