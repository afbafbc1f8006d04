"""A word, once, about adapters that do not train: after the first optimizer step on a model, those without a gradient.

Code that reads a layer's weight past the layer is found beforehand only where `weight_readers` sees it; layers that
nothing calls, branches that a model does not take and checkpointing over inputs that need no gradient end the same way.
"""

import warnings
import weakref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fused_lora.adapters.holders import all_holders

_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models of which no step was seen
_strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that hold nothing of these
_hooks: list[RemovableHandle] = []  # the one on all optimizers, which stays: taken off in a step it would break others


def watch(root: nn.Module) -> None:
    """Have the first optimizer step that trains adapters of this model followed by a warning of those among them that
    have no gradient; from then on the hook returns at once."""
    _watched.add(root)
    _strangers.clear()
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Optimizer, *args) -> None:
    if not _watched or optimizer in _strangers:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    seen = [root for root in _watched if _report(root, trained)]
    for root in seen:
        _watched.discard(root)
    if not seen:
        _strangers.add(optimizer)


def _report(root: nn.Module, trained: set[int]) -> bool:
    """Warn of the model's adapters among these parameters that have no gradient. Returns: whether there were any."""
    stepped, dead = False, []
    for name, layer in all_holders(root)[0].items():
        for adapter_name in layer.active_adapters:
            lora_B = layer.lora_B[adapter_name]
            if id(lora_B) in trained and lora_B.requires_grad and lora_B.numel():  # FSDP1 leaves some ranks nothing
                stepped = True
                if lora_B.grad is None:
                    dead.append(name)
    if dead:
        shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        warnings.warn(
            f"no gradient reached the adapters of {shown} before the first optimizer step: nothing calls these layers, "
            "code that reads their weights passes by the adapters, or the inputs of a checkpointed part need no "
            "gradient (model.enable_input_require_grads()); such adapters stay what they are",
            stacklevel=2,
        )
    return stepped
