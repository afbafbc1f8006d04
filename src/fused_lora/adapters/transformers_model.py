"""transformers' models with adapters of this library, as transformers, its Trainer and TRL see them.

`save_pretrained` asks a model whether it has adapters, which one is active and which tensors are its own, and writes an
adapter folder then. A transformers model that gets an adapter becomes an instance of a subclass of its own class, of
the same name, that answers; without adapters it is of its own class again. Nothing of transformers is changed.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fused_lora.adapters import model as functions
from fused_lora.adapters.holders import (
    active_adapters,
    adapter_names,
    all_holders,
    file_keys,
    live_keys,
    named_holders,
    own_tensors,
)
from fused_lora.adapters.load_save import adapter_tensors, base_tensors, config_file, load_adapter
from fused_lora.adapters.merging import saying_untied, untied
from fused_lora.adapters.mixed_batch import sequences, taking_names
from fused_lora.adapters.peft_config import CONFIG_NAME
from fused_lora.adapters.peft_format import write_files
from fused_lora.adapters.unload import (
    check_deletable,
    delete_adapter,
    disable_adapter,
    merge_and_unload,
    switch_off,
    switch_on,
    unload,
)
from fused_lora.adapters.wrappers import plain_key, whole_tensor
from fused_lora.files import write_whole
from fused_lora.nn.by_name import as_list
from fused_lora.nn.experts import LoRAParameter

_TRAINER_FOLDER, _TRAINER_FILE = re.compile(r"checkpoint-\d+"), "model.safetensors"


def adopt(root: nn.Module) -> None:
    """Have every transformers model in `root` that holds adapters answer for them."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return
    for module in root.modules():
        if isinstance(module, transformers.PreTrainedModel) and not isinstance(module, AdaptedModel):
            plain: type = type(module)
            if named_holders(module):
                module.__class__ = _adapted_class(plain)


def release(root: nn.Module) -> None:
    """Give models without adapters their own class back."""
    for module in root.modules():
        if isinstance(module, AdaptedModel) and not adapter_names(module):
            vars(module).pop("_enabled_adapters", None)
            module.__class__ = module.plain_class


class AdaptedModel(nn.Module):
    """What stands before a transformers class: the methods of transformers' PeftAdapterMixin, for adapters of this
    library, and those of PEFT's models that scripts call."""

    plain_class: type

    def __new__(cls, *args, **kwargs):
        """A new model has no adapters, so it is of the plain class. DataParallel and accelerate make a copy of a module
        from the class alone, and give it the original's state."""
        return cls.plain_class(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def __reduce_ex__(self, protocol):
        """The subclass is made anew where a copy or a pickle of the model is."""
        return _blank, (self.plain_class,), self.__getstate__()

    disable_adapter = disable_adapter
    get_nb_trainable_parameters = functions.get_nb_trainable_parameters
    merge_and_unload = merge_and_unload
    print_trainable_parameters = functions.print_trainable_parameters
    unload = unload

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether this is a model with adapters to transformers; a merged one is a plain model."""
        return not any(holder.merged for holder in named_holders(self).values())

    @property
    def peft_config(self) -> dict[str, "AdapterFile"]:
        return {name: AdapterFile(self, name) for name in adapter_names(self)}

    def active_adapters(self) -> list[str]:
        return active_adapters(self)

    def set_adapter(self, adapter_name) -> None:
        functions.set_adapter(self, adapter_name)

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        functions.apply_lora(self, config=adapter_config, adapter_name=adapter_name or "default")

    def load_adapter(
        self,
        peft_model_id,
        adapter_name: str | None = None,
        *,
        is_trainable: bool = True,
        hotswap: bool | str = "auto",
        low_cpu_mem_usage: bool = False,
        **where,
    ) -> None:
        """`fused_lora.load_adapter` under a new name, or with `hotswap` under one that is there. The adapter trains if
        `is_trainable`; loading takes little memory in any case."""
        if hotswap not in (True, False, "auto"):
            raise ValueError(f"hotswap must be True, False or 'auto'; got {hotswap!r}")
        name = adapter_name or "default"
        if (name in adapter_names(self)) is not (hotswap is True):
            rule = "an adapter's with hotswap=True, else new"
            raise ValueError(f"adapter_name must be {rule}; got {name!r} beside {adapter_names(self)}, {hotswap=}")
        load_adapter(self, peft_model_id, name, **where)
        for tensor in () if is_trainable else own_tensors(self, name):
            tensor.requires_grad_(False)

    def enable_peft_hotswap(self, *_, **__) -> None:
        """Raises ValueError: `load_adapter` needs no preparation."""
        raise ValueError("load_adapter(..., hotswap=True) swaps adapters of one rank; got enable_peft_hotswap")

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        names = list(dict.fromkeys(as_list(adapter_names)))
        check_deletable(self, names)  # all, before the first is gone
        for name in names:
            delete_adapter(self, name)

    def disable_adapters(self) -> None:
        """As the context manager `disable_adapter`, until `enable_adapters` or until an adapter is set."""
        if active_adapters(self):
            self._enabled_adapters = switch_off(self)

    def enable_adapters(self) -> None:
        before = vars(self).pop("_enabled_adapters", {})
        if not active_adapters(self):
            switch_on(self, before)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors by their keys in PEFT's file less its prefix, taken from the model's state dict where
        that is given."""
        name = adapter_name or self._adapter_to_save()
        own = [tensor for _, tensor in self._live_tensors(name, state_dict)]
        keys = [key.removeprefix("base_model.model.") for key in file_keys(self, name)]
        return dict(zip(keys, own, strict=True))

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs) -> None:
        """As transformers' own: the folder of the active adapter, or, inside `merged`, of the plain model. Of several
        active adapters each gets a folder of its name in it, as PEFT does it.

        A base model that came from no folder or hub, so that the adapter cannot name it, is saved beside the adapter.
        In a folder that has the name of a Trainer's checkpoint, all adapters are written under the model's own keys
        too: Trainer resumes from that file alone. Under FSDP every process must call this.
        """
        if self._hf_peft_config_loaded:
            self._save_adapter(save_directory, is_main_process, state_dict, **kwargs)
        else:
            self._check_all_merged()
            with saying_untied(self):
                state = untied(self, self.state_dict() if state_dict is None else state_dict)
                super().save_pretrained(save_directory, is_main_process, state, **kwargs)  # type: ignore[misc]

    def _save_adapter(self, save_directory, is_main_process=True, state_dict=None, **kwargs) -> None:
        folder, active = Path(save_directory), active_adapters(self)
        names = active if len(active) > 1 else [self._adapter_to_save()]
        if len(names) > 1 and kwargs.get("push_to_hub"):
            raise ValueError(f"one adapter must be active to be pushed, set_adapter says which; got {names}")
        own = {name: dict(self._live_tensors(name, state_dict)) for name in names}
        for_trainer: dict[str, Tensor] = {}
        if _TRAINER_FOLDER.fullmatch(folder.name):
            for name in adapter_names(self):
                for_trainer |= own[name] if name in own else self._live_tensors(name, state_dict)
        if not vars(self).get("name_or_path"):
            base = base_tensors(self, state_dict)
            with _as_plain(self):
                options = {**kwargs, "push_to_hub": False}  # all files are pushed below
                self.save_pretrained(save_directory, is_main_process, {**base, **for_trainer}, **options)
        elif for_trainer and is_main_process:
            tensors = {key: tensor.contiguous() for key, tensor in for_trainer.items()}
            write_whole({folder / _TRAINER_FILE: to_bytes(tensors, metadata={"format": "pt"})})
        if len(names) == 1:
            super().save_pretrained(save_directory, is_main_process, own[names[0]], **kwargs)  # type: ignore[misc]
        for name in names if len(names) > 1 and is_main_process else []:
            values = [own[name][key] for key in live_keys(self, name)]
            tensors = dict(zip(file_keys(self, name), values, strict=True))
            write_files(folder / name, tensors, config_file(self, name))

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's. Beside adapters alone, which Trainer reads of a checkpoint, the base is not missing."""
        outcome = super().load_state_dict(state_dict, strict, assign)
        own = {key for name in adapter_names(self) for key in live_keys(self, name)}
        if state_dict and own.issuperset(state_dict):
            outcome.missing_keys[:] = [key for key in outcome.missing_keys if key in own]
        return outcome

    def _adapter_to_save(self) -> str:
        names = active_adapters(self)
        if len(names) != 1:
            raise ValueError(f"one adapter must be active to be saved, set_adapter says which; got {names}")
        return names[0]

    def _live_tensors(self, adapter_name: str, state_dict: dict[str, Tensor] | None) -> list[tuple[str, Tensor]]:
        """An adapter's whole tensors and their keys in the model's state dict, in the order of `file_keys`.

        Raises: ValueError for an adapter whose experts share factors, which lies otherwise in the file than here.
        """
        for name, layer in all_holders(self)[0].items():
            if isinstance(layer, LoRAParameter) and adapter_name in layer.lora_A and layer.shares(adapter_name):
                raise ValueError(
                    f"adapter {adapter_name!r} must be saved by save_adapter, which writes factors that experts share "
                    f"for each expert; {name} has some"
                )
        keys = live_keys(self, adapter_name)
        if state_dict is None:
            return list(zip(keys, adapter_tensors(self, adapter_name).values(), strict=True))
        given = {plain_key(key.removeprefix("module.")): tensor for key, tensor in state_dict.items()}
        return [(key, whole_tensor(given[key])) for key in keys]

    def _check_all_merged(self) -> None:
        """Raises ValueError if some layers are merged and an adapter acts in others: no folder could hold that."""
        for name, layer in all_holders(self)[0].items():
            if layer.active_adapter is not None and not layer.merged:
                raise ValueError(f"{name} must be merged as others are, or all unmerged, to be saved; got it unmerged")


class AdapterFile:
    """An adapter's configuration as transformers saves it.

    Args:
        model: holds the adapter.
        adapter_name: its name.
    """

    def __init__(self, model: nn.Module, adapter_name: str):
        self.model, self.adapter_name = model, adapter_name

    @property
    def peft_type(self):
        """PEFT asks for it when it is given the model to adapt."""
        raise AttributeError(
            "model must be the base model to get PEFT's adapters, fused_lora.unload(model) gives it back; got one with "
            "adapters of fused_lora"
        )

    def save_pretrained(self, save_directory) -> None:
        """Write adapter_config.json."""
        path = Path(save_directory) / CONFIG_NAME
        write_whole({path: config_file(self.model, self.adapter_name)})


@cache
def _adapted_class(plain: Any) -> type:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    names["forward"] = taking_names(plain.forward, lambda model, given: 1)
    if hasattr(plain, "generate"):
        names["generate"] = taking_names(plain.generate, sequences)
    return type(plain)(plain.__name__, (AdaptedModel, plain), {**names, "plain_class": plain})


def _blank(plain: type) -> nn.Module:
    """A model with adapters before its state is given to it."""
    return object.__new__(_adapted_class(plain))


@contextmanager
def _as_plain(model: AdaptedModel) -> Iterator[None]:
    """Inside, the model is of its own class, which saves it as a plain model."""
    kind = type(model)
    model.__class__ = kind.plain_class
    try:
        yield
    finally:
        model.__class__ = kind
