"""Adapters of whole models: put them on and switch them."""

from contextlib import suppress
from typing import Any

from torch import nn

from fused_lora.adapters.conventions import for_model
from fused_lora.adapters.holders import (
    Layers,
    adapter_names,
    all_holders,
    biased_adapters,
    held,
    named_holders,
    naming,
    train_biases,
)
from fused_lora.adapters.peft_config import from_peft, is_peft_config
from fused_lora.adapters.plan import Plan, make_plan
from fused_lora.adapters.starts import check_start, first_factors, start
from fused_lora.adapters.untrained import watch
from fused_lora.adapters.weight_readers import call_all_layers
from fused_lora.adapters.wrappers import check_no_peft, check_open, is_replicated, reshard, unwrapped
from fused_lora.config import LoraConfig, check_adapter_name, unknown_name
from fused_lora.nn import LoRALayer, lora_layer
from fused_lora.nn.by_name import ActiveAdapter, as_list
from fused_lora.nn.experts import LoRAParameter, pattern_name
from fused_lora.nn.mixed_batch import Mixed
from fused_lora.nn.modules_to_save import ModuleToSave


def apply_lora(
    model: nn.Module,
    r: int | LoraConfig = 8,
    lora_alpha: float = 8,
    target_modules: str | list[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    modules_to_save: list[str] | None = None,
    adapter_name: str = "default",
    *,
    exclude_modules: str | list[str] | None = None,
    target_parameters: list[str] | None = None,
    layers_to_transform: int | list[int] | None = None,
    layers_pattern: str | list[str] | None = None,
    task_type: str | None = None,
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
    ensure_weight_tying: bool = False,
    init_lora_weights: bool | str = True,
    use_dora: bool = False,
    dora_exact: bool = False,
    allora_eta: float | None = None,
    allora_mode: str = "gradient",
    bias: str = "none",
    lora_bias: bool = False,
    config: LoraConfig | None = None,
) -> nn.Module:
    """Put a fresh LoRA adapter on a model's linear layers, in place, and freeze everything else.

    Linear layers become `LoRALinear`s over the same Parameters, or around a layer of a kind of its own; embeddings and
    convolutions get adapters where they are named. Called again with another adapter_name it adds that adapter and
    activates it. nn.TransformerEncoder's fused inference path, which would pass by the adapters, is off from then on.

    Args:
        model: any module, in wrappers or not; DistributedDataParallel and FSDP come after adapters.
        r, lora_alpha, lora_dropout, use_rslora: as in `LoRALinear`.
        target_modules, rank_pattern, alpha_pattern, modules_to_save, exclude_modules, target_parameters,
            layers_to_transform, layers_pattern, task_type, trainable_token_indices, ensure_weight_tying,
            init_lora_weights, use_dora, dora_exact, allora_eta, allora_mode, bias, lora_bias: as in `LoraConfig`.
        adapter_name: its name, without dots and slashes, and no attribute of torch.nn.Module.
        config: a LoraConfig, or PEFT's own, instead of all that but adapter_name; it may stand in the place of r, too.
    Returns: model.
    Raises: ValueError naming the argument, what was expected and what was given; the model is unchanged then.
    Source: names and matching rules as in Hugging Face PEFT's LoraConfig.
    """
    given: dict[str, Any] = {
        "lora_alpha": lora_alpha,
        "target_modules": target_modules,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "rank_pattern": rank_pattern or {},
        "alpha_pattern": alpha_pattern or {},
        "modules_to_save": modules_to_save or [],
        "exclude_modules": exclude_modules or [],
        "target_parameters": target_parameters or [],
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
        "task_type": task_type,
        "init_lora_weights": init_lora_weights,
    }
    given |= dict(use_dora=use_dora, dora_exact=dora_exact, allora_eta=allora_eta, allora_mode=allora_mode)
    given |= dict(bias=bias, lora_bias=lora_bias)
    given |= dict(trainable_token_indices=trainable_token_indices, ensure_weight_tying=ensure_weight_tying)
    if config is None and (isinstance(r, LoraConfig) or is_peft_config(r)):
        lora_config = _config(given, r, unwrapped(model))
    else:
        lora_config = _config({"r": r, **given}, config, unwrapped(model))
    check_adapter_name(adapter_name)
    check_addable(model)
    known = adapter_names(model)
    if adapter_name in known:
        raise ValueError(f"adapter_name must be new to the model, which has {known}; got {adapter_name!r}")
    lora_config = for_model(lora_config, model)
    plan = make_plan(model, lora_config, strict=True)
    check_start(plan, lora_config)
    check_one_bias(unwrapped(model), lora_config)
    first = first_factors(plan, lora_config)
    install(unwrapped(model), plan, lora_config, adapter_name)
    start(unwrapped(model), adapter_name, lora_config.init_lora_weights, first)
    set_adapter(model, adapter_name)
    return model


def _config(given: dict, config, model: nn.Module) -> LoraConfig:
    """The configuration of keywords, or of an object, ours or PEFT's, beside which no keyword is given."""
    if config is None:
        return LoraConfig(**given)
    usual = LoraConfig()
    for name, value in given.items():
        if value != getattr(usual, name):
            raise ValueError(f"config and {name} exclude each other; got both, {name}={value!r}")
    if isinstance(config, LoraConfig):
        return config
    if not is_peft_config(config):
        raise ValueError(f"config must be a LoraConfig, fused_lora's or PEFT's; got a {type(config).__name__}")
    return from_peft(config, model)


def set_adapter(model: nn.Module, adapter_name: str | list[str] | None) -> None:
    """Make one adapter of the model, or those of a list, active and the only ones that train; None is the base model.

    The updates of several are added; one that is named twice counts twice, as in PEFT. Layers and modules_to_save
    without such an adapter run as in the base model; of modules_to_save one copy can act.

    Raises: ValueError for an unknown adapter, if another one is merged into some layer, for ALLoRA among several in one
        or for two copies of a module; nothing changes then.
    """
    root = unwrapped(model)
    check_settable(model, adapter_name)
    layers, wrappers = all_holders(root)
    reshard(root)
    for layer in layers.values():
        layer.set_adapter(held(adapter_name, layer))
    for wrapper in wrappers.values():
        wrapper.set_adapter(held(adapter_name, wrapper))
    for name in biased_adapters(layers):
        train_biases(root, name, name in as_list(adapter_name))


def check_settable(model: nn.Module, adapter_name: ActiveAdapter) -> None:
    """Raises ValueError if `set_adapter` would refuse these adapters, in whichever layer."""
    root = unwrapped(model)
    check_not_mixed(root, "set_adapter")
    check_may_train(model, checked_names(root, adapter_name))
    for name, layer in all_holders(root)[0].items():
        own = held(adapter_name, layer)
        if layer.link is not None and not layer.link.acts_with(own):
            check_unlinked({name: layer}, "set_adapter acts on")
        with naming(name):
            layer.check_settable(own)


def checked_names(root: nn.Module, adapter_name: ActiveAdapter) -> list[str]:
    """The names of adapters that are to act together. Raises: ValueError if they cannot."""
    if not (adapter_name is None or isinstance(adapter_name, str | list | tuple)):
        raise ValueError(f"adapter_name must be a name, a list of names or None; got {adapter_name!r}")
    names, known = as_list(adapter_name), adapter_names(root)
    if names and not known:
        raise ValueError("model must have adapters of this library; got one without")
    for name in names:
        if name not in known:
            raise unknown_name("adapter_name", name, known)
    for place, wrapper in all_holders(root)[1].items():
        if isinstance(several := held(names, wrapper), list):
            raise ValueError(f"adapter_name must name one adapter that trains a copy of {place}; got {several}")
    return names


def get_nb_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are; tied ones count once, two 4-bit numbers in a byte as two."""
    trainable = total = 0
    for parameter in model.parameters():
        numbers = parameter.numel()
        if type(parameter).__name__ == "Params4bit":  # of bitsandbytes, packed
            numbers *= 2 * parameter.element_size()
        total += numbers
        trainable += numbers if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line: trainable parameters, all parameters and the percentage, tied parameters counted once."""
    trainable, total = get_nb_trainable_parameters(model)
    percent = f"{100 * trainable / max(total, 1):.4f}"
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent}")


def check_may_train(model: nn.Module, names: list[str]) -> None:
    """Raises ValueError where DistributedDataParallel has taken stock of what trains, and it is other adapters."""
    layers, _ = all_holders(model)
    trains = {name for layer in layers.values() for name, lora_A in layer.lora_A.items() if lora_A.requires_grad}
    if is_replicated(model) and trains != set(names):
        raise ValueError(
            "model must be wrapped in DistributedDataParallel after the adapter that trains is set, it would not "
            f"synchronise another's gradients; got one that trains {sorted(trains)} for {names}"
        )


def check_addable(model: nn.Module) -> None:
    """Raises ValueError if no new adapter can be put on the model now."""
    check_no_peft(model)
    check_open(model)
    check_not_merged(model, "an adapter is added")
    check_not_mixed(model, "adding an adapter")
    check_unlinked(all_holders(model)[0], "an adapter is added to")


def check_one_bias(root: nn.Module, config: LoraConfig) -> None:
    """Raises ValueError if a new adapter is to train biases that another trains, the base has one of each."""
    trained = biased_adapters(all_holders(root)[0])
    if config.bias != "none" and trained:
        raise ValueError(f"bias must be 'none' for all adapters but one; got {config.bias!r} beside {trained}")


def check_not_merged(model: nn.Module, what: str) -> None:
    """Raises ValueError naming a layer that holds a merged adapter, before `what`."""
    for name, layer in all_holders(model)[0].items():
        if layer.merged:
            raise ValueError(f"{name} must be unmerged before {what}; got adapter {layer.active_adapter!r} merged")


def check_unlinked(layers: Layers, what: str) -> None:
    """Raises ValueError naming a layer in which something acts instead of the active adapter, before `what`."""
    for name, layer in layers.items():
        if layer.link is not None:
            raise ValueError(f"{layer.link} must be removed, by its remove(), before {what} {name}")


def check_not_mixed(model: nn.Module, what: str) -> None:
    """Raises ValueError inside a context of several adapters in a batch, which excludes `what`."""
    for holder in named_holders(model).values():
        if isinstance(holder, Mixed):
            raise ValueError(
                f"{what} and adapters_per_sample or adapters_per_token exclude each other, leave their context first; "
                f"got a batch of {list(holder.mixed.distinct)}"
            )


def install(root: nn.Module, plan: Plan, config: LoraConfig, adapter_name: str) -> None:
    """Carry out a plan: replace plain modules wherever they are reached, add the adapter to the others, freeze the
    rest. If that fails, for lack of memory, the model is as before."""
    trains = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    replacement: dict[int, nn.Module] = {}
    try:
        for name, module in plan.linears.items():
            given = vars(config.layer(name))
            if isinstance(module, LoRALayer):
                layer = module
                layer.add_adapter(adapter_name, **given)
            else:
                replacement[id(module)] = layer = lora_layer(module, adapter_name=adapter_name, **given)
            layer.trains_bias[adapter_name] = config.bias
        for name, target in plan.parameters.items():
            given = vars(config.layer(pattern_name(name, target)))
            if not isinstance(target, LoRAParameter):
                inner = replacement.get(id(target.module), target.module)
                replacement[id(target.module)] = target = LoRAParameter(inner, target.parameter_name)
            target.add_adapter(adapter_name, **given)
        copies: dict[str, nn.Module] = {}
        for name, saved in plan.saved.modules.items():
            wrapper = saved if isinstance(saved, ModuleToSave) else ModuleToSave(saved)
            tied_to = copies.get(plan.saved.ties.get(name, ""))
            copies[name] = wrapper.add_adapter(adapter_name, plan.saved.rows.get(name), tied_to)
            replacement[id(saved)] = wrapper
    except BaseException:
        for holder in (*plan.linears.values(), *plan.parameters.values()):
            if isinstance(holder, LoRALayer) and adapter_name in holder.lora_A:
                holder.delete_adapter(adapter_name)
        for saved in plan.saved.modules.values():
            if isinstance(saved, ModuleToSave):
                with suppress(KeyError):
                    del saved.modules_to_save[adapter_name]
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        raise
    for place in plan.places:
        if id(place.module) in replacement and not place.inside:
            setattr(place.parent, place.attribute, replacement[id(place.module)])
    root.requires_grad_(False)
    call_all_layers(root)
    watch(root)
    from fused_lora.adapters.transformers_model import adopt  # which binds the functions of this file

    adopt(root)
