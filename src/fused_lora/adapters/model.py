"""Adapters of whole models: apply, save, load, switch and merge LoRA in PEFT's names and file format."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fused_lora.adapters import peft_format
from fused_lora.adapters.plan import Plan, make_plan, walk
from fused_lora.config import LoraConfig, check_adapter_name, unknown_name
from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.modules_to_save import ModuleToSave


def apply_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 8,
    target_modules: str | list[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    modules_to_save: list[str] | None = None,
    adapter_name: str = "default",
) -> nn.Module:
    """Put a fresh LoRA adapter on a model's linear layers, in place, and freeze everything else.

    The layers become `LoRALinear`s over the same Parameters. Called again with another adapter_name it adds that
    adapter and activates it.

    Args:
        model: any module whose targets are exactly torch.nn.Linear.
        r, lora_alpha, lora_dropout, use_rslora: as in `LoRALinear`.
        target_modules: "all-linear" for every nn.Linear but the output head, a list of names or their ends after a dot,
            or a regular expression for the whole name.
        rank_pattern, alpha_pattern: r and lora_alpha of layers whose name, or its end after a dot, a key matches as a
            regular expression.
        modules_to_save: ends of names of modules of which the adapter trains and saves a full copy.
        adapter_name: its name, without dots.
    Returns: model.
    Raises: ValueError naming the argument, what was expected and what was given; the model is unchanged then.
    Source: names and matching rules as in Hugging Face PEFT's LoraConfig.
    """
    as_list = [
        list(value) if isinstance(value, tuple | set) else value for value in (target_modules, modules_to_save or [])
    ]
    spec = LoraConfig(
        r, lora_alpha, as_list[0], lora_dropout, use_rslora, rank_pattern or {}, alpha_pattern or {}, as_list[1]
    )
    root = _root(model)
    _check_ready(root, adapter_name)
    if adapter_name in _adapter_names(root):
        raise ValueError(
            f"adapter_name must be new to the model, which has {_adapter_names(root)}; got {adapter_name!r}"
        )
    _install(root, make_plan(root, spec, strict=True), spec, adapter_name)
    set_adapter(root, adapter_name)
    return model


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors, tensors in their own dtype.

    Args:
        model: a model with adapters.
        directory: made if missing; adapter files in it are replaced atomically.
        adapter_name: the adapter; its name is not written.
    Raises: ValueError for an unknown adapter; OSError naming the file, with the old files untouched.
    """
    root = _root(model)
    layers, saved = _holders(root, adapter_name)
    if not layers:
        raise unknown_name("adapter_name", adapter_name, _adapter_names(root))
    spec = peft_format.spec_of(layers, list(saved), [place.name for place in walk(root)], adapter_name)
    config = peft_format.config_bytes(spec, root)
    peft_format.write_files(Path(directory), _tensors(layers, saved, adapter_name), config)


def load_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> nn.Module:
    """Read an adapter that PEFT or `save_adapter` wrote, and activate it, trainable. Only safetensors is read, nothing
    is unpickled.

    A plain model gets the layers that the configuration names; a model with adapters gets one more, or, under a name
    that it has, new values in the same shapes. Tensors are converted to the dtype that a fresh adapter has (float32
    over a bf16 or fp16 base).

    Args:
        model: the base model, plain or with adapters of this library.
        directory: holds adapter_config.json and adapter_model.safetensors.
        adapter_name: the name to give it.
    Returns: model.
    Raises: FileNotFoundError; ValueError for a damaged file, an adapter of another base model, and configurations
        beyond plain LoRA, each naming file and field. The model is unchanged then.
    """
    directory, root = Path(directory), _root(model)
    _check_ready(root, adapter_name)
    spec = peft_format.read_config(directory)
    try:
        plan = make_plan(root, spec, strict=False)
    except ValueError as error:
        raise ValueError(f"{directory / peft_format.CONFIG_NAME} does not fit the model: {error}") from None
    known = adapter_name in _adapter_names(root)
    if known:
        _check_same_places(root, plan, spec, adapter_name)
    peft_format.check_tensors(directory, _expected(plan, spec))
    values = peft_format.read_tensors(directory)
    if not known:
        _install(root, plan, spec, adapter_name)
    layers, saved = _holders(root, adapter_name)
    for name, layer in layers.items():
        layer.set_hyperparameters(adapter_name, spec.alpha_of(name), spec.lora_dropout, spec.use_rslora)
    with torch.no_grad():
        for key, tensor in _tensors(layers, saved, adapter_name).items():
            tensor.copy_(values[key])
    set_adapter(root, adapter_name)
    return model


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Make one adapter of the model active and the only one that trains; None is the base model.

    Layers and modules_to_save without that adapter run as in the base model.

    Raises: ValueError for an unknown adapter, or if another one is merged into some layer; nothing changes then.
    """
    root = _root(model)
    known = _adapter_names(root)
    if adapter_name is not None and adapter_name not in known:
        raise unknown_name("adapter_name", adapter_name, known)
    layers, wrappers = _all_holders(root)
    for name, layer in layers.items():
        if layer.merged and layer.active_adapter != adapter_name:
            raise ValueError(
                f"{name}: adapter {layer.active_adapter!r} is merged, unmerge before switching; got {adapter_name!r}"
            )
    for layer in layers.values():
        layer.set_adapter(adapter_name if adapter_name in layer.lora_A else None)
    for wrapper in wrappers.values():
        wrapper.set_adapter(adapter_name if adapter_name in wrapper.modules_to_save else None)


@contextmanager
def merged(model: nn.Module, adapter_name: str | None = None) -> Iterator[nn.Module]:
    """Run with an adapter folded into the weights: every layer is one GEMM, and `model.state_dict()` is that of the
    plain model.

    On leaving, also by an exception, every base weight and the active adapters are restored bit for bit.

    Args:
        model: a model with adapters, none of them merged.
        adapter_name: the adapter to merge; None takes the active one.
    Raises: ValueError for an unknown adapter, none active, a layer that is merged already, or a merged weight that is
        not finite.
    """
    root = _root(model)
    layers, wrappers = _all_holders(root)
    holders = [*layers.values(), *wrappers.values()]
    if adapter_name is not None and adapter_name not in _adapter_names(root):
        raise unknown_name("adapter_name", adapter_name, _adapter_names(root))
    if adapter_name is None and all(holder.active_adapter is None for holder in holders):
        raise ValueError(f"adapter_name must be one of {_adapter_names(root)} while no adapter is active; got None")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} must not be merged yet; got adapter {layer.active_adapter!r} merged")
    before = [holder.active_adapter for holder in holders]
    try:
        for holder in (
            holders if adapter_name is not None else []
        ):  # without touching requires_grad, so an optimizer sees no change
            has = holder.lora_A if isinstance(holder, LoRALinear) else holder.modules_to_save
            holder.active_adapter = adapter_name if adapter_name in has else None
        for wrapper in wrappers.values():
            wrapper.merged = True
        for name, layer in layers.items():
            if layer.active_adapter is not None:
                try:
                    layer.merge()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        yield model
    finally:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
        for wrapper in wrappers.values():
            wrapper.merged = False
        for holder, name in zip(holders, before, strict=True):
            holder.active_adapter = name


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line: trainable parameters, all parameters and the percentage, tied parameters counted once."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: "
        f"{100 * trainable / max(total, 1):.4f}"
    )


def _root(model: nn.Module) -> nn.Module:
    """The module under torch.compile's and DistributedDataParallel's wrappers, whose names stay out of the files."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _all_holders(root: nn.Module) -> tuple[dict[str, LoRALinear], dict[str, ModuleToSave]]:
    """Every layer and wrapper that can hold an adapter, each once, by the first name it is reached by."""
    layers, wrappers, seen = {}, {}, set()
    for place in walk(root):
        if id(place.module) not in seen:
            seen.add(id(place.module))
            if isinstance(place.module, LoRALinear):
                layers[place.name] = place.module
            elif isinstance(place.module, ModuleToSave):
                wrappers[place.name] = place.module
    return layers, wrappers


def _holders(root: nn.Module, adapter_name: str) -> tuple[dict[str, LoRALinear], dict[str, ModuleToSave]]:
    """The layers and wrappers that hold this adapter."""
    layers, wrappers = _all_holders(root)
    return (
        {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A},
        {name: wrapper for name, wrapper in wrappers.items() if adapter_name in wrapper.modules_to_save},
    )


def _adapter_names(root: nn.Module) -> list[str]:
    layers, wrappers = _all_holders(root)
    return sorted(
        {name for layer in layers.values() for name in layer.lora_A}
        | {name for w in wrappers.values() for name in w.modules_to_save}
    )


def _check_ready(root: nn.Module, adapter_name: str) -> None:
    """Raises ValueError if no adapter of this name can be put on the model now."""
    check_adapter_name(adapter_name)
    if getattr(root, "peft_config", None):
        raise ValueError(f"model must be the base model; got a {type(root).__name__} with PEFT adapters")
    for name, layer in _all_holders(root)[0].items():
        if layer.merged:
            raise ValueError(
                f"{name} must be unmerged before an adapter is added; got adapter {layer.active_adapter!r} merged"
            )


def _install(root: nn.Module, plan: Plan, spec: LoraConfig, adapter_name: str) -> None:
    """Carry out a plan: replace plain modules wherever they are reached, add the adapter to the others, freeze the
    rest."""
    replacement: dict[int, nn.Module] = {}
    for name, module in plan.linears.items():
        arguments = (spec.r_of(name), spec.alpha_of(name), spec.lora_dropout, spec.use_rslora, adapter_name)
        if isinstance(module, LoRALinear):
            module.add_adapter(adapter_name, *arguments[:-1])
        else:
            replacement[id(module)] = LoRALinear.from_linear(module, *arguments)
    for module in plan.saved.values():
        wrapper = module if isinstance(module, ModuleToSave) else ModuleToSave(module)
        wrapper.add_adapter(adapter_name)
        replacement[id(module)] = wrapper
    for place in plan.places:
        if id(place.module) in replacement and not place.inside:
            setattr(place.parent, place.attribute, replacement[id(place.module)])
    root.requires_grad_(False)


def _tensors(layers: dict, saved: dict, adapter_name: str) -> dict[str, torch.Tensor]:
    """The adapter's own tensors, not copies, by their keys in the file."""
    tensors = {}
    for name, layer in layers.items():
        key_A, key_B = peft_format.lora_keys(name)
        tensors[key_A], tensors[key_B] = layer.lora_A[adapter_name].detach(), layer.lora_B[adapter_name].detach()
    for name, wrapper in saved.items():
        for key, tensor in wrapper.modules_to_save[adapter_name].state_dict().items():
            tensors[peft_format.saved_key(name, key)] = tensor
    return tensors


def _expected(plan: Plan, spec: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that a file for this plan must have."""
    shapes = {}
    for name, module in plan.linears.items():
        key_A, key_B = peft_format.lora_keys(name)
        shapes[key_A], shapes[key_B] = (spec.r_of(name), module.in_features), (module.out_features, spec.r_of(name))
    for name, module in plan.saved.items():
        original = module.original_module if isinstance(module, ModuleToSave) else module
        shapes.update(
            {peft_format.saved_key(name, key): tuple(tensor.shape) for key, tensor in original.state_dict().items()}
        )
    return shapes


def _check_same_places(root: nn.Module, plan: Plan, spec: LoraConfig, adapter_name: str) -> None:
    """Raises ValueError unless the adapter that the model has under this name sits in the plan's places with the plan's
    ranks."""
    layers, saved = _holders(root, adapter_name)
    for what, have, want in (("layers", layers, plan.linears), ("modules_to_save", saved, plan.saved)):
        if set(have) != set(want):
            differ = sorted(set(have) ^ set(want))
            raise ValueError(
                f"adapter {adapter_name!r} exists on other {what} than the file's, which differ in {differ[:3]}; load "
                "under a new name"
            )
    for name, layer in layers.items():
        if layer.r[adapter_name] != spec.r_of(name):
            have, want = layer.r[adapter_name], spec.r_of(name)
            raise ValueError(
                f"adapter {adapter_name!r} exists with r={have} in {name}; got r={want}, load under a new name"
            )
