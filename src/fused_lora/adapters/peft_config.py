"""adapter_config.json as PEFT has it, without PEFT: read strictly, written with the fields that others read. Also
PEFT's LoraConfig object, known by its methods."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType

from torch import nn

from fused_lora.adapters.wrappers import plain_class
from fused_lora.config import STARTS_OF_WEIGHTS, LoraConfig
from fused_lora.layer_config import lora_scaling
from fused_lora.name_patterns import matches
from fused_lora.nn.experts import LoRAParameter, pattern_name
from fused_lora.nn.layer import LoRALayer

CONFIG_NAME = "adapter_config.json"
_SUPPORTED = tuple(field.name for field in fields(LoraConfig))
# Fields that change no number of a plain LoRA forward. loftq_config, eva_config, qalora_group_size, layers_pattern and
# megatron_core act only with another field, which is checked.
_WITHOUT_EFFECT = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "fan_in_fan_out",  # says how the base's weight lies, which its class says, too
    "loftq_config",
    "eva_config",
    "qalora_group_size",
    "layers_pattern",
    "megatron_core",
}
# for all layers of an adapter
_SAID_ONCE = ("lora_dropout", "use_rslora", "use_dora", "dora_exact", "allora_eta", "allora_mode", "lora_bias")
# which PEFT's LoraConfig has not, and what they are without us
_OURS = {"dora_exact": False, "allora_eta": None, "allora_mode": "gradient"}
_NONE_IF_EMPTY = ("modules_to_save", "exclude_modules", "target_parameters")
_OFF: tuple = (None, False, "none", [], {})
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # which a file's values make one


def read_config(directory: Path) -> LoraConfig:
    """The supported part of adapter_config.json.

    Raises: FileNotFoundError naming the file; ValueError for anything that `LoraConfig` does not have, naming file,
        field and value.
    """
    path = directory / CONFIG_NAME
    config = _read_object(path)
    try:
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type must be 'LORA'; got {config.get('peft_type')!r}")
        start = config.get("init_lora_weights")
        if start not in _PLAIN_STARTS + STARTS_OF_WEIGHTS:
            raise ValueError(
                f"init_lora_weights must be one of {_PLAIN_STARTS[1:] + STARTS_OF_WEIGHTS}, others rewrite the base "
                f"weights or the forward; got {start!r}"
            )
        config["init_lora_weights"] = start if start in STARTS_OF_WEIGHTS else True
        return _from_fields(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_peft_config(config: object) -> bool:
    """Whether an object is a configuration of PEFT's, which is not imported to ask it."""
    return hasattr(config, "peft_type") and hasattr(config, "to_dict")


def from_peft(config, model: nn.Module) -> LoraConfig:
    """The same configuration, of PEFT's LoraConfig for a fresh adapter; target_modules that are None are PEFT's own for
    a model of this type.

    Raises: ValueError for anything that is not a plain LoRA configuration, naming field and value.
    """
    given = config.to_dict()
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"config: peft_type must be 'LORA'; got {kind!r}")
    if given.get("target_modules") is None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as usual

        given["target_modules"] = usual.get(getattr(getattr(model, "config", None), "model_type", None))
    try:
        return _from_fields(given)
    except ValueError as error:
        raise ValueError(f"config: {error}") from None


def _from_fields(config: Mapping) -> LoraConfig:
    """PEFT's fields, absent ones at PEFT's defaults; all that is not supported must be off."""
    for field, value in config.items():
        if field not in _SUPPORTED and field not in _WITHOUT_EFFECT and value not in _OFF:
            raise ValueError(f"{field} is not supported and must be off; got {value!r}")
    given = {field: config[field] for field in _SUPPORTED if config.get(field) is not None}
    if given.get("layers_to_transform") in (None, []):
        given.pop("layers_pattern", None)  # which acts only with it
    if "target_modules" not in given and given.get("target_parameters"):
        given["target_modules"] = []
    if "target_modules" not in given:
        raise ValueError(f"target_modules must be a list or a regular expression; got {config.get('target_modules')!r}")
    return LoraConfig(**given)


def _read_object(path: Path) -> dict:
    """The JSON object of a file. Raises: ValueError naming the file for anything that is not plain JSON in UTF-8,
    nested too deep, with a key twice, or with a number or a character that JSON does not have."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"the key {key!r} {count} times in one object")
        return dict(pairs)

    def constant(name: str):
        raise ValueError(f"the number {name}")

    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(config, ensure_ascii=False).encode()  # a lone surrogate can neither be printed nor written again
    except RecursionError:
        raise ValueError(f"{path} must be JSON; got one nested too deep") from None
    except ValueError as error:  # of json, of the decoder, of int(), of the two above
        raise ValueError(f"{path} must be JSON; got {str(error).encode(errors='replace').decode()}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def config_of(
    layers: dict[str, LoRALayer],
    saved: list[str],
    others: list[str],
    adapter_name: str,
    *,
    parameters: Collection[str] = (),
    moved: Collection[str] = (),
    task_type: str | None = None,
    rows: Mapping[str, list[int]] = MappingProxyType({}),
    tied: bool = False,
) -> LoraConfig:
    """The configuration that describes an adapter as it sits in a model.

    Args:
        layers: the layers that hold it, by name.
        saved: names of the modules that it trains in full.
        others: names of all modules of the model.
        adapter_name: the adapter.
        parameters: names of all parameters of the model.
        moved: last parts of names that PEFT takes for experts in this model; linear layers of these names are written
            as the parameters that their weights are.
        task_type: PEFT's, if the model has a head of that kind among `saved`.
        rows: the numbers of the rows that it trains of modules, by their names.
        tied: whether modules among `saved` share a tensor.
    Raises: ValueError if the layers differ in what PEFT can say only once (lora_dropout, use_rslora and the like), or a
        scaling was set by hand.
    """
    first = next(iter(layers.values()))
    for name, layer in layers.items():
        for field in _SAID_ONCE:
            want, got = getattr(first.config(adapter_name), field), getattr(layer.config(adapter_name), field)
            if want != got:
                raise ValueError(
                    f"{field} must be the same in all layers, PEFT's format holds one; got {want} and, in {name}, {got}"
                )
        want = lora_scaling(layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.use_rslora[adapter_name])
        got = float(layer.scaling[adapter_name])
        if not math.isclose(want, got, rel_tol=1e-6):  # a 0-d fp32 tensor is as good as the float
            raise ValueError(
                f"scaling of {name} must be {want}, as its r and lora_alpha say, which is all that the file holds; got "
                f"{got}"
            )
    named = {name: pattern_name(name, layer) for name, layer in layers.items() if isinstance(layer, LoRAParameter)}
    if first.lora_dropout[adapter_name] == 0:
        named |= {name: f"{name}.weight" for name in layers if name.rpartition(".")[2] in moved}
    ranks = {named.get(name, name): layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {named.get(name, name): layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    config = LoraConfig(
        r=_commonest(ranks),
        lora_alpha=_commonest(alphas),
        **{field: getattr(first.config(adapter_name), field) for field in _SAID_ONCE},
        rank_pattern=_exceptions(ranks),
        alpha_pattern=_exceptions(alphas),
        modules_to_save=saved,
        trainable_token_indices=dict(rows) or None,
        ensure_weight_tying=tied,
        task_type=task_type if saved else None,
        init_lora_weights=first.init_lora_weights[adapter_name],
        bias=first.trains_bias[adapter_name],
    )
    reachable = {name for name in others if not config.excludes(name)}
    return replace(
        config,
        target_modules=_shortest_targets(set(layers) - set(named), reachable),
        target_parameters=_shortest_parameters(set(named.values()), set(parameters)),
    )


def _commonest(values: dict):
    return Counter(values.values()).most_common(1)[0][0]


def _exceptions(values: dict) -> dict:
    """What differs from the commonest value, by a regular expression for the layer's whole name."""
    usual = _commonest(values)
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _shortest_targets(names: set[str], reachable: set[str]) -> str | list[str]:
    """target_modules that select exactly `names` among `reachable`: their last parts, else whole names, else a regular
    expression."""
    for targets in ({name.rpartition(".")[2] for name in names}, names):
        if {name for name in reachable if matches(targets, name)} == names:
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(names))


def _shortest_parameters(names: set[str], reachable: set[str]) -> list[str]:
    """target_parameters that select exactly `names` among `reachable`: one or two last parts of names, else whole
    ones."""
    for parts in (1, 2):
        targets = {".".join(name.split(".")[-parts:]) for name in names}
        if {name for name in reachable if matches(targets, name)} == names:
            return sorted(targets)
    return sorted(names)


def config_bytes(config: LoraConfig, model: nn.Module) -> bytes:
    """adapter_config.json for this model: the fields that PEFT, vLLM, SGLang and TensorRT-LLM read of a LoRA adapter,
    and those of ours that are set, which PEFT leaves out with a warning. PEFT fills in its defaults for the others."""
    kind = plain_class(model)
    content = {
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": vars(model).get("name_or_path") or None,
        "fan_in_fan_out": any(module.fan_in_fan_out for module in model.modules() if isinstance(module, LoRALayer)),
        "inference_mode": True,
        "peft_type": "LORA",
        "revision": None,
    }
    content |= {field: getattr(config, field) for field in _SUPPORTED}
    content |= {field: getattr(config, field) or None for field in _NONE_IF_EMPTY}
    for field, usual in _OURS.items():
        if content[field] == usual:
            del content[field]
    return json.dumps(content, indent=2, sort_keys=True).encode()
