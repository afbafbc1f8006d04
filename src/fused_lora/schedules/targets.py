"""The layers of a model that a schedule merges."""

from torch import nn

from fused_lora.adapters.holders import active_adapters, all_holders
from fused_lora.adapters.model import check_not_merged
from fused_lora.adapters.wrappers import is_replicated, is_sharded, unwrapped
from fused_lora.nn.layer import LoRALayer
from fused_lora.schedules.folding import check_foldable
from fused_lora.schedules.stack import check_stackable
from fused_lora.schedules.stages import Stages


def find_layers(model: nn.Module, stages: Stages) -> tuple[str, dict[str, LoRALayer]]:
    """The active adapter and the layers in which it acts. Raises: ValueError if they cannot be merged in place."""
    root = unwrapped(model)
    if is_sharded(model):
        raise ValueError("model must not be sharded, no process has its whole weights; got a sharded one")
    check_not_merged(root, "a merge schedule begins")
    names = active_adapters(root)
    if len(names) != 1:
        raise ValueError(f"model must have one active adapter of this library; got {names}")
    layers = {name: layer for name, layer in all_holders(root)[0].items() if layer.active_adapter == names[0]}
    check_foldable(root, layers, names[0])
    if stages.export == "stack":
        check_stackable(layers, names[0])
    if stages.ranks:
        have = {layer.r[names[0]] for layer in layers.values()}
        if have != {stages.ranks[0]}:
            raise ValueError(
                f"ranks must begin with the adapter's own rank in every layer, {sorted(have)}; got {list(stages.ranks)}"
            )
        if is_replicated(model):
            raise ValueError(
                "ranks must be empty under DistributedDataParallel, which would not synchronise the gradients of "
                f"new Parameters; got {list(stages.ranks)}"
            )
    return names[0], layers
