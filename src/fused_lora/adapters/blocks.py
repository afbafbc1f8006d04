"""The blocks that a model is a row of, such as decoder layers, and the layers with adapters in each."""

from typing import NamedTuple

from torch import nn

from fused_lora.adapters.holders import all_holders
from fused_lora.adapters.wrappers import is_sharded, plain_key, unwrapped
from fused_lora.nn.around import LoRALinearAround
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.linear import LoRALinear


class Block(NamedTuple):
    """One block."""

    name: str  # in the plain model
    module: nn.Module  # in its wrappers, whose hooks would lie outside of what is checkpointed
    layers: dict[str, LoRALinear]  # with an active adapter, by name within the block


def rows_of_blocks(model: nn.Module, who: str) -> list[list[Block]]:
    """The model's rows of blocks, in its order, with all layers in which an adapter acts.

    A row is an nn.ModuleList, or an nn.Sequential of modules of one class, that lies in no other row.

    Args:
        model: with adapters, in wrappers or not.
        who: what links the layers, for messages.
    Raises: ValueError if the model is sharded, or an adapter acts in a layer that cannot be linked: merged or linked
        already, outside the rows, no LoRALinear, or around a base that is kept whole.
    """
    root = unwrapped(model)
    if is_sharded(model):
        raise ValueError(f"{who} and sharding exclude each other; got a sharded model")
    acting = {name: layer for name, layer in all_holders(root)[0].items() if layer.active_adapter is not None}
    for name, layer in acting.items():
        _check(name, layer, who)
    rows: list[list[Block]] = []
    inside: set[str] = set()
    for path, module in root.named_modules():
        if any(path.startswith(f"{outer}.") for outer in inside) or not _is_row(module):
            continue
        inside.add(path)
        blocks = [_block(f"{path}.{key}" if path else key, child) for key, child in module.named_children()]
        if any(block.layers for block in blocks):
            rows.append(blocks)
    reached = {id(layer) for row in rows for block in row for layer in block.layers.values()}
    outside = [name for name, layer in acting.items() if id(layer) not in reached]
    if outside or not acting:
        raise ValueError(
            f"{who} needs adapters that act in layers of the model's blocks, an nn.ModuleList or nn.Sequential of "
            f"modules of one class; got {', '.join(outside[:3]) or 'no adapter active'}"
        )
    return rows


def _is_row(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    return isinstance(module, nn.Sequential) and len({type(unwrapped(child)) for child in module}) == 1


def _block(path: str, child: nn.Module) -> Block:
    module = unwrapped(child)
    layers = {plain_key(name): layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}
    return Block(plain_key(path), module, {name: x for name, x in layers.items() if x.active_adapter is not None})


def check_alone(name: str, layer: LoRALayer, who: str) -> None:
    """Raises ValueError if something else links the layer."""
    if layer.link is not None:
        raise ValueError(f"{who} and {layer.link} exclude each other: remove() the latter first; got both, at {name}")


def _check(name: str, layer: LoRALayer, who: str) -> None:
    """Raises ValueError if a layer cannot be linked."""
    if layer.merged:
        raise ValueError(f"{name} must be unmerged before {who}; got adapter {layer.active_adapter!r} merged")
    check_alone(name, layer, who)
    if layer.variants:
        raise ValueError(f"{who} needs plain LoRA; got adapters {sorted(layer.variants)} of another kind at {name}")
    if not isinstance(layer, LoRALinear) or isinstance(layer, LoRALinearAround):
        raise ValueError(
            f"{who} needs linear layers that are neither quantised nor hooked nor of a class of their own; got {name}, "
            f"a {type(layer).__name__}"
        )
