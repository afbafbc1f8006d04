"""The model that preference training compares with."""

import copy

from torch import nn

from fused_lora.adapters.holders import adapter_names, live_keys
from fused_lora.adapters.model import check_not_merged
from fused_lora.adapters.wrappers import is_sharded, plain_key, unwrapped


def reference_model(model: nn.Module) -> nn.Module:
    """A frozen twin of an adapted model as it is now, over the same base weights: what DPO and its kin compare with.

    Adapters, and what modules_to_save trains, are copied; every other tensor is the model's own, so the twin costs an
    adapter. `trl.DPOTrainer(model, ref_model=reference_model(model))` starts from a trained adapter as it does with a
    PEFT model; without `ref_model` it loads the base model once more and compares with that.

    Args:
        model: with adapters, not sharded: FSDP and ZeRO-3 need a reference of their own, loaded again.
    Returns: the twin, in eval mode.
    Raises: ValueError for a model without adapters, a merged or a sharded one.
    """
    root = unwrapped(model)
    if not adapter_names(root):
        raise ValueError("model must have adapters of this library; got one without")
    check_not_merged(root, "it is copied")
    if is_sharded(model):
        raise ValueError("model must not be sharded, load_adapter into a second base model; got a sharded one")
    state = {plain_key(key): tensor for key, tensor in root.state_dict(keep_vars=True).items()}
    own = {id(state[key]) for name in adapter_names(root) for key in live_keys(root, name)}
    shared = {id(t): t for t in state.values() if id(t) not in own and not t.requires_grad}
    return copy.deepcopy(root, shared).requires_grad_(False).eval()
