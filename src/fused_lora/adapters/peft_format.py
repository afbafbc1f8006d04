"""PEFT's adapter files: adapter_config.json and adapter_model.safetensors, their keys, checked reading and atomic
writing."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fused_lora.config import LoraConfig, lora_scaling, matches
from fused_lora.files import write_whole

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_SUPPORTED = tuple(LoraConfig.__dataclass_fields__)
# Fields that change no number of a plain LoRA forward. loftq_config, eva_config, qalora_group_size, layers_pattern and
# megatron_core act only with another field, which is checked.
_WITHOUT_EFFECT = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "runtime_config",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "qalora_group_size",
    "layers_pattern",
    "megatron_core",
}
_OFF = (None, False, "none", [], {})
_PLAIN_INIT = (True, False, "gaussian", "orthogonal", "eva")


def lora_keys(name: str) -> tuple[str, str]:
    """The keys of A and B of the layer of this name."""
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def saved_key(name: str, key: str) -> str:
    """The key of the entry `key` in the state dict of the modules_to_save module of this name."""
    return f"{_PREFIX}{name}.{key}"


def read_config(directory: Path) -> LoraConfig:
    """The supported part of adapter_config.json.

    Raises: FileNotFoundError naming the file; ValueError for anything that is not a plain LoRA configuration, naming
        file, field and value.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON; got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA'; got {config.get('peft_type')!r}")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        raise ValueError(
            f"{path}: init_lora_weights must be one of {_PLAIN_INIT}, others rewrite the base weights or the forward; "
            f"got {init!r}"
        )
    for field, value in config.items():
        if field not in _SUPPORTED and field not in _WITHOUT_EFFECT and value not in _OFF:
            raise ValueError(f"{path}: {field} is not supported and must be off; got {value!r}")
    given = {field: config[field] for field in _SUPPORTED if config.get(field) is not None}
    if "target_modules" not in given:
        raise ValueError(
            f"{path}: target_modules must be a list or a regular expression; got {config.get('target_modules')!r}"
        )
    try:
        return LoraConfig(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_tensors(directory: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare the header of adapter_model.safetensors with the keys and shapes that the model needs, reading no tensor.

    Raises: FileNotFoundError naming the file; ValueError for a pickle, a file that is not safetensors, and missing,
        unexpected, wrongly shaped or non-floating tensors.
    """
    path = directory / WEIGHTS_NAME
    if not path.exists():
        if (directory / PICKLE_NAME).exists():
            raise ValueError(
                f"{directory} must hold {WEIGHTS_NAME}, safetensors only; got {PICKLE_NAME}, a pickle, which can run "
                "code when read"
            )
        raise FileNotFoundError(2, "No such file", str(path))
    with _open(path) as file:
        keys = set(file.keys())
        for what, wrong in (("missing", sorted(set(expected) - keys)), ("unexpected", sorted(keys - set(expected)))):
            if wrong:
                raise ValueError(
                    f"{path} must hold the {len(expected)} tensors that {CONFIG_NAME} asks for in this model; got "
                    f"{len(keys)}, "
                    f"{len(wrong)} {what}: {', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''} (an adapter for "
                    "another base model?)"
                )
        for key, shape in expected.items():
            got = file.get_slice(key)
            if tuple(got.get_shape()) != tuple(shape):
                name = key.removeprefix(_PREFIX)
                raise ValueError(
                    f"{path} is an adapter for another base model: {name} must have shape {list(shape)}; got "
                    f"{got.get_shape()}"
                )
            if got.get_dtype() not in ("F64", "F32", "F16", "BF16") and ".lora_" in key:
                raise ValueError(f"{path}: {key} must be floating point; got {got.get_dtype()}")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of adapter_model.safetensors, on the CPU."""
    with _open(directory / WEIGHTS_NAME) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open has no __iter__


def _open(path: Path):
    """safe_open with errors that name the file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file; got {error}") from None


def spec_of(layers: dict, saved: list[str], others: list[str], adapter_name: str) -> LoraConfig:
    """The configuration that describes an adapter as it sits in a model.

    Args:
        layers: the LoRALinears that hold it, by name.
        saved: names of the modules that it trains in full.
        others: names of all modules of the model.
        adapter_name: the adapter.
    Raises: ValueError if the layers differ in what PEFT can say only once (lora_dropout, use_rslora), or a scaling was
        set by hand.
    """
    first = next(iter(layers.values()))
    for name, layer in layers.items():
        for field in ("lora_dropout", "use_rslora"):
            want, got = getattr(first, field)[adapter_name], getattr(layer, field)[adapter_name]
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
    r = Counter(layer.r[adapter_name] for layer in layers.values()).most_common(1)[0][0]
    lora_alpha = Counter(layer.lora_alpha[adapter_name] for layer in layers.values()).most_common(1)[0][0]
    spec = LoraConfig(
        r,
        lora_alpha,
        list(layers),
        first.lora_dropout[adapter_name],
        first.use_rslora[adapter_name],
        {f"^{re.escape(name)}": layer.r[adapter_name] for name, layer in layers.items() if layer.r[adapter_name] != r},
        {
            f"^{re.escape(name)}": layer.lora_alpha[adapter_name]
            for name, layer in layers.items()
            if layer.lora_alpha[adapter_name] != lora_alpha
        },
        saved,
    )
    reachable = {name for name in others if not spec.excludes(name)}
    return LoraConfig(**{**vars(spec), "target_modules": _shortest_targets(set(layers), reachable)})


def _shortest_targets(names: set[str], reachable: set[str]) -> str | list[str]:
    """target_modules that select exactly `names` among `reachable`: their last parts, else whole names, else a regular
    expression."""
    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in reachable if matches(targets, name)} == names:
            return targets
    return "|".join(re.escape(name) for name in sorted(names))


def config_bytes(spec: LoraConfig, model: torch.nn.Module) -> bytes:
    """adapter_config.json as PEFT writes it for this model."""
    from peft import LoraConfig  # imports transformers, which takes seconds: only who saves pays

    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=spec.target_modules,
        lora_dropout=spec.lora_dropout,
        use_rslora=spec.use_rslora,
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
        modules_to_save=spec.modules_to_save or None,
        inference_mode=True,
        base_model_name_or_path=model.__dict__.get("name_or_path") or None,
        auto_mapping={"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
    )
    plain = {field: sorted(value) if isinstance(value, set) else value for field, value in config.to_dict().items()}
    return json.dumps(plain, indent=2, sort_keys=True).encode()


def write_files(directory: Path, tensors: dict[str, Tensor], config: bytes) -> None:
    """Write both files, see `files.write_whole`. Raises: OSError naming the file."""
    contiguous = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    weights = to_bytes(contiguous, metadata={"format": "pt"})
    write_whole({directory / WEIGHTS_NAME: weights, directory / CONFIG_NAME: config})
