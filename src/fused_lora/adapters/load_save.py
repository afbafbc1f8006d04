"""Adapters to and from PEFT's files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters import peft_config, peft_format
from fused_lora.adapters.conventions import moved_layers, task_type_of, with_stored_head
from fused_lora.adapters.holders import (
    Layers,
    Wrappers,
    adapter_names,
    all_holders,
    are_tied,
    biased_adapters,
    biases_in,
    holders_of,
    live_keys,
    module_names,
    own_tensors,
    rows_of,
    tensors_of,
    trained_biases,
)
from fused_lora.adapters.hub import adapter_directory
from fused_lora.adapters.model import (
    check_addable,
    check_not_merged,
    check_not_mixed,
    check_one_bias,
    check_settable,
    install,
    set_adapter,
)
from fused_lora.adapters.places import parameter_names, walk
from fused_lora.adapters.plan import Plan, make_plan
from fused_lora.adapters.starts import check_start, first_factors, start
from fused_lora.adapters.wrappers import (
    check_no_peft,
    check_readable_again,
    fetched,
    fill,
    plain_key,
    unwrapped,
    whole,
    whole_tensor,
)
from fused_lora.config import STARTS_OF_WEIGHTS, LoraConfig, check_adapter_name, unknown_name
from fused_lora.nn import LoRALayer, layer_class
from fused_lora.nn.experts import LoRAParameter, pattern_name
from fused_lora.nn.layer import adapter_place
from fused_lora.nn.modules_to_save import ModuleToSave
from fused_lora.nn.trained_rows import ROWS_KEY, TrainedRows


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors, tensors in their own dtype.

    Names are those of the plain model, whatever wraps it or a part of it. Under FSDP, ZeRO-3 and tensor parallelism
    every process must call this, and each writes the whole adapter.

    Args:
        model: a model with adapters.
        directory: made if missing; adapter files in it are replaced atomically.
        adapter_name: the adapter; its name is not written.
    Raises: ValueError for an unknown adapter, or one without values; OSError naming the file, with the old files
        untouched.
    """
    check_no_peft(unwrapped(model))
    if not str(directory):
        raise ValueError("directory must be the path of a folder; got an empty one")
    tensors = adapter_tensors(model, adapter_name)
    peft_format.write_files(Path(directory), tensors, config_file(unwrapped(model), adapter_name))


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Whole copies of an adapter's tensors on the CPU, by their keys in the file; every process must come here.

    Raises: ValueError for an unknown adapter, or one without values.
    """
    root = unwrapped(model)
    layers, saved = _layers_of(root, adapter_name)
    copies = [wrapper.modules_to_save[adapter_name] for wrapper in saved.values()]
    with whole(model), fetched([*layers.values(), *copies], own_tensors(root, adapter_name)):
        tensors = {key: whole_tensor(t) for key, t in tensors_of(root, adapter_name).items()}
        for key, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(f"adapter {adapter_name!r} must have values to be saved; got {key} on the meta device")
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}


def config_file(root: nn.Module, adapter_name: str) -> bytes:
    """adapter_config.json of an adapter. Raises: ValueError for an unknown adapter, or what the format cannot say."""
    layers, saved = _layers_of(root, adapter_name)
    config = peft_config.config_of(
        layers,
        [name for name, wrapper in saved.items() if not isinstance(wrapper.modules_to_save[adapter_name], TrainedRows)],
        module_names(root),
        adapter_name,
        rows=rows_of(saved, adapter_name),
        tied=are_tied(saved, adapter_name),
        parameters=[key for place in walk(root) for key in parameter_names(place)],
        moved=moved_layers(root),
        task_type=task_type_of(root),
    )
    return peft_config.config_bytes(config, root)


def _layers_of(root: nn.Module, adapter_name: str) -> tuple[Layers, Wrappers]:
    layers, saved = holders_of(root, adapter_name)
    if not layers:
        raise unknown_name("adapter_name", adapter_name, adapter_names(root))
    return layers, saved


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Read an adapter that PEFT or `save_adapter` wrote, and activate it, trainable. Only safetensors is read, nothing
    is unpickled.

    A plain model gets the layers that the configuration names; a model with adapters gets one more, or, under a name
    that it has, new values in the same shapes. Tensors are converted to the dtype that a fresh adapter has (float32
    over a bf16 or fp16 base). Tensors of the base model that PEFT writes along (an output head that is a target) must
    be equal to the model's.

    Args:
        model: the base model, plain or with adapters of this library, in wrappers or not. Under FSDP, tensor
            parallelism and DistributedDataParallel only an adapter that it has can be read again, under DeepSpeed none.
        directory: holds adapter_config.json and adapter_model.safetensors; or "owner/name" on the Hugging Face hub, if
            huggingface_hub is installed.
        adapter_name: the name to give it.
        revision, subfolder: where on the hub; a subfolder may be a directory's, too.
        local_files_only: whether it must have been downloaded from there before.
    Returns: model.
    Raises: FileNotFoundError; ValueError for a damaged file, an adapter of another base model, a model on the meta
        device or offloaded, and configurations with what `LoraConfig` does not have, each naming file and field. The
        model is unchanged then.
    """
    root = unwrapped(model)
    check_adapter_name(adapter_name)
    known = adapter_name in adapter_names(root)
    if known:
        check_no_peft(model)
        check_readable_again(model)
        check_not_merged(root, "an adapter is read again")
        check_not_mixed(root, "reading an adapter")
        check_settable(model, adapter_name)
    else:
        check_addable(model)
    directory = adapter_directory(directory, revision, subfolder, local_files_only)
    config = with_stored_head(peft_config.read_config(directory), root, lambda: peft_format.stored_names(directory))
    with whole(model, writeback=True):
        plan = _plan_of_existing(root, directory, config, adapter_name) if known else _plan(root, directory, config)
        if not known:
            check_start(plan, config)
            check_one_bias(root, config)
        _check_values_here(plan)
        again = {peft_format.file_key(name, ROWS_KEY) for name in plan.saved.ties if name in plan.saved.rows}
        found = peft_format.find_tensors(directory, _expected(root, plan, config), lambda: base_tensors(root), again)
        values = peft_format.read_tensors(directory, found)
        if not known:
            first = first_factors(plan, config)
            install(root, plan, config, adapter_name)
            start(root, adapter_name, config.init_lora_weights, first)
        for name, layer in holders_of(root, adapter_name)[0].items():
            given = config.layer(pattern_name(name, layer))
            variant = given.dora_exact, given.allora_eta, given.allora_mode
            layer.set_hyperparameters(adapter_name, given.lora_alpha, given.lora_dropout, given.use_rslora, *variant)
        with torch.no_grad():
            for key, tensor in tensors_of(root, adapter_name).items():
                fill(tensor, values[key])
        set_adapter(root, adapter_name)
    return model


def _plan(root: nn.Module, directory: Path, config: LoraConfig) -> Plan:
    try:
        return make_plan(root, config, strict=False)
    except ValueError as error:
        raise ValueError(f"{directory / peft_config.CONFIG_NAME} does not fit the model: {error}") from None


def _plan_of_existing(root: nn.Module, directory: Path, config: LoraConfig, adapter_name: str) -> Plan:
    """The plan of an adapter that the model has. Raises: ValueError unless it sits in the file's places with the
    file's ranks."""
    plan = _plan(root, directory, config)
    layers, saved = holders_of(root, adapter_name)
    for what, have, want in (
        ("layers", layers, {**plan.linears, **plan.parameters}),
        ("modules_to_save or trainable_token_indices", saved, plan.saved.modules),
    ):
        if set(have) != set(want):
            differ = sorted(set(have) ^ set(want))
            raise ValueError(
                f"adapter {adapter_name!r} exists on other {what} than the file's, which differ in {differ[:3]}; load "
                "under a new name"
            )
    has_rows, new_rows = rows_of(saved, adapter_name), plan.saved.own_rows()
    if has_rows != new_rows:
        raise ValueError(
            f"adapter {adapter_name!r} exists with trainable_token_indices={has_rows}; got {new_rows}, load under a "
            "new name"
        )
    for name, layer in layers.items():
        init, new_init = layer.init_lora_weights[adapter_name], config.init_lora_weights
        if init != new_init and {init, new_init} & set(STARTS_OF_WEIGHTS):
            raise ValueError(
                f"adapter {adapter_name!r} exists with init_lora_weights={init!r}; got {new_init!r}, load into a fresh "
                "model"
            )
        if isinstance(layer, LoRAParameter) and layer.shares(adapter_name):
            raise ValueError(
                f"adapter {adapter_name!r} exists with factors that the experts of {name} share, the file has one for "
                "each; load under a new name"
            )
        has = layer.config(adapter_name)
        kinds = {"use_dora": has.use_dora, "lora_bias": has.lora_bias, "bias": layer.trains_bias[adapter_name]}
        for field, is_so in kinds.items():
            if is_so != (wanted := getattr(config, field)):
                raise ValueError(
                    f"adapter {adapter_name!r} exists with {field}={is_so!r}; got {wanted!r}, load under a new name"
                )
        r, new_r = layer.r[adapter_name], config.layer(pattern_name(name, layer)).r
        if r != new_r:
            raise ValueError(
                f"adapter {adapter_name!r} exists with r={r} in {name}; got r={new_r}, load under a new name"
            )
    return plan


def _check_values_here(plan: Plan) -> None:
    """Raises ValueError if what an adapter is to be read into has no values here: they would be dropped in silence."""
    targets = plan.linears | {name: target.module for name, target in plan.parameters.items()}
    elsewhere = [name for name, module in targets.items() if _is_elsewhere(module)]
    elsewhere += [name for name, module in plan.saved.modules.items() if any(t.is_meta for t in module.parameters())]
    if elsewhere:
        raise ValueError(
            "model must have its values before load_adapter (load it first; offload it afterwards); got "
            f"{elsewhere[0]} on the meta device"
        )


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether an adapter's tensors over a module, those that it has or fresh ones, are on the meta device."""
    layer = module if isinstance(module, LoRALayer) else None
    held = [t for name in layer.lora_A for t in layer.own_tensors(name)] if layer is not None else []
    device, _ = adapter_place(module if layer is None else layer.base())
    return device.type == "meta" or any(t.is_meta for t in held)


def base_tensors(root: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The base model's tensors by the plain model's names, from the model's state dict if that is given."""
    own = {key for name in adapter_names(root) for key in live_keys(root, name)} - _bias_keys(root)
    state = {plain_key(key): tensor for key, tensor in (state_dict or root.state_dict()).items()}
    return {peft_format.base_name(key): tensor for key, tensor in state.items() if key not in own}


def _bias_keys(root: nn.Module) -> set[str]:
    """The keys of the model's state dict at which there are biases of the base that train with an adapter."""
    trained = {
        id(bias) for name in biased_adapters(all_holders(root)[0]) for bias in trained_biases(root, name).values()
    }
    named = root.named_parameters(remove_duplicate=False) if trained else ()
    return {plain_key(key) for key, parameter in named if id(parameter) in trained}


def _expected(root: nn.Module, plan: Plan, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that a file for this plan must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in plan.linears.items():
        kind, own = layer_class(module), config.layer(name)
        named = kind.file_shapes(kind.shapes_over(module, own.r), own)
        shapes |= {peft_format.file_key(name, key): shape for key, shape in named.items()}
    for name, target in plan.parameters.items():
        own = config.layer(pattern_name(name, target))
        named = LoRAParameter.file_shapes(target.adapter_shapes(own.r), own)
        shapes |= {peft_format.file_key(name, key): shape for key, shape in named.items()}
    for name, saved in plan.saved.modules.items():
        original: Any = saved.original_module if isinstance(saved, ModuleToSave) else saved
        if name in plan.saved.rows:
            if name not in plan.saved.ties:
                shapes[peft_format.file_key(name, ROWS_KEY)] = len(plan.saved.rows[name]), original.weight.shape[1]
            continue
        for key, tensor in original.state_dict().items():
            shapes[peft_format.file_key(name, plain_key(key))] = tuple(tensor.shape)
    return shapes | {key: tuple(bias.shape) for key, bias in biases_in(root, config.bias, plan.linears).items()}
