"""PEFT's wrapper of a Parameter, with the experts of transformers' mixtures on the grouped op."""

from typing import Any

from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import Tensor, nn

from fused_lora.nn.expert_layouts import stacked
from fused_lora.nn.routed import ExpertUpdate, routed, unrouted
from fused_lora.ops.internals import PLAIN_TENSORS, bare


class ParamWrapper(PeftParamWrapper):
    """PEFT's lora.ParamWrapper whose update is computed on each expert's own tokens, where the module is an experts
    class of transformers' interface; PEFT's forward for any other.

    Equivalent to: `peft.tuners.lora.layer.ParamWrapper`, which adds the update to all experts' weights in each forward,
    in their dtype; here it is added to the products.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the experts return for the tokens x [T, K]."""
        updates = "it is called with keywords" if kwargs else expert_updates(self)
        if isinstance(updates, str):
            return super().forward(x, *args, **kwargs)
        return routed(self.get_base_layer(), updates, x, *args)


def expert_updates(layer: Any) -> dict[str, list[ExpertUpdate]] | str:
    """What a wrapper and those in it add to the experts' weights, or why PEFT must add it."""
    updates: dict[str, list[ExpertUpdate]] = {}
    wrapper = layer
    while isinstance(wrapper, PeftParamWrapper):
        if wrapper is not layer and not bare(wrapper):
            return "a wrapper in it has hooks or a forward of its own"
        if wrapper._disable_adapters and wrapper.merged_adapters:
            return "its adapters are disabled and must be unmerged"
        if not wrapper._disable_adapters and not wrapper.merged_adapters:
            added = [_update(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]
            for update in added:
                if isinstance(update, str):
                    return update
            if added:
                updates[wrapper.parameter_name] = [update for update in added if isinstance(update, ExpertUpdate)]
        wrapper = wrapper.base_layer
    if not updates:
        return "none of its adapters acts"
    return unrouted(wrapper, list(updates)) or updates


def _update(wrapper: Any, name: str) -> ExpertUpdate | str:
    """What one adapter adds, or why PEFT must add it."""
    modules = wrapper.lora_A[name], wrapper.lora_B[name]
    if any(type(module) is not nn.Linear or not bare(module) for module in modules):
        return f"adapter {name!r} has hooks or layers of its own"
    lora_A, lora_B = (module.weight for module in modules)
    if {type(lora_A), type(lora_B)} - PLAIN_TENSORS or lora_A.dtype is not lora_B.dtype:
        return f"adapter {name!r} holds no plain tensors of one dtype"
    return ExpertUpdate(*stacked(lora_A, lora_B, wrapper.r[name]), wrapper.scaling[name])
