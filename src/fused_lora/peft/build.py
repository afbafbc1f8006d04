"""Fused layers from the start: for models that others build."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import dispatch_default
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from fused_lora.peft.classes import swap


@contextmanager
def patched() -> Iterator[None]:
    """A context in which every LoRA layer that PEFT makes is one that `fuse` would have made of it.

    Equivalent to ``fuse(model)`` for each PEFT model that is built, loaded or given an adapter inside, by whoever does
    it: get_peft_model, PeftModel.from_pretrained, AutoPeftModel, transformers' add_adapter, TRL. The layers stay
    fused after it. It acts on the whole process while it lasts, may be nested, and is undone when an exception leaves
    it.
    """
    create, init_tokens = LoraModel.__dict__["_create_new_module"], TrainableTokensWrapper.init_modules

    def created(*args: Any, **kwargs: Any) -> nn.Module:
        layer = create.__func__(*args, **kwargs)
        swap(layer)
        return layer

    def init_fused_tokens(self: Any, *args: Any, **kwargs: Any) -> None:
        init_tokens(self, *args, **kwargs)
        swap(self.token_adapter)

    LoraModel._create_new_module = staticmethod(created)
    TrainableTokensWrapper.init_modules = init_fused_tokens
    try:
        yield
    finally:
        LoraModel._create_new_module, TrainableTokensWrapper.init_modules = create, init_tokens


def custom_module_mapping() -> dict[type[nn.Module], Callable[..., nn.Module | None]]:
    """What `LoraConfig._register_custom_module` takes, for fused layers wherever that configuration goes::

        config = LoraConfig(r=16, target_modules="all-linear")
        config._register_custom_module(custom_module_mapping())
        trainer = SFTTrainer(model, peft_config=config, ...)

    The mapping declines what is no plain nn.Linear or Conv1D (quantised layers are subclasses), and PEFT goes on as
    without it. PEFT doesn't save it: a model that is loaded again wants `fuse`, `patched`, or the configuration.
    """
    return {nn.Linear: _make, Conv1D: _make}


def _make(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """The fused layer over `target`, as PEFT's default makes it, or None where another of PEFT's dispatchers may be
    meant."""
    base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) not in (nn.Linear, Conv1D) or type(base.weight) is not nn.Parameter:
        return None
    if kwargs.get("parameter_name") is not None:
        return None
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    swap(layer)
    return layer
