"""Finding a model's layers that get the same tensor, to compute them together."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters.holders import all_holders
from fused_lora.adapters.places import walk
from fused_lora.adapters.wrappers import unwrapped
from fused_lora.nn.grouped import GroupedLoRALinear, Projections
from fused_lora.nn.linear import LoRALinear


def group(model: nn.Module, inputs: Mapping[str, Any] | Tensor | None = None) -> list[list[str]]:
    """Have the LoRA layers of a module that get the very same tensor, such as the projections to queries, keys and
    values, or a gated MLP's first two, compute together in training: one autograd Function and one buffer for dx.

    Which they are is watched in one forward. In a later one layers that are given another tensor, or one that was
    written to in between, or whose own factors, weight, scaling or mode have changed in between, compute alone, and so
    does the whole group from then on. Values, gradients and dropout's masks are those of the layers alone, up to the
    order of dx's sums. It acts on the CPU in fp32, in plain eager mode; elsewhere (autocast, torch.compile, no
    gradients, several adapters or another variant active) layers compute alone, as they do where nothing is found.

    Args:
        model: with adapters, in wrappers or not.
        inputs: what the model is called with once, in eval mode and without gradients: keywords, or one tensor; None
            takes a transformers model's `dummy_inputs`.
    Returns: the names of the layers in each new group.
    Raises: ValueError if the model has no adapters, or inputs are needed.
    """
    root = unwrapped(model)
    layers = {name: layer for name, layer in all_holders(root)[0].items() if type(layer) is LoRALinear}
    if not any(isinstance(layer, LoRALinear) for layer in all_holders(root)[0].values()):
        raise ValueError("model must have LoRA adapters on linear layers to be grouped; got one without")
    if inputs is None:
        inputs = getattr(root, "dummy_inputs", None)
    if inputs is None:
        raise ValueError("inputs must be given for a model that has no dummy_inputs of transformers; got None")
    parents = {id(place.module): place.parent for place in walk(root)}
    groups: list[list[str]] = []
    for names in _together(root, layers, inputs, parents):
        members = [layers[name] for name in names]
        Projections(members, parents[id(members[0])])
        groups.append(names)
    return groups


@torch.no_grad()
def _together(
    root: nn.Module, layers: dict[str, LoRALinear], inputs: Mapping[str, Any] | Tensor, parents: dict[int, nn.Module]
) -> list[list[str]]:
    """The names of layers of one parent that get one tensor, each once in a forward."""
    seen: dict[tuple, list[str]] = defaultdict(list)
    held: list[Tensor] = []
    calls: dict[str, int] = defaultdict(int)

    def watch(name: str, layer: LoRALinear):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            held.append(args[0])  # so that no other tensor gets its id
            calls[name] += 1
            seen[id(parents[id(layer)]), id(args[0]), args[0]._version].append(name)

        return layer.register_forward_pre_hook(hook)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    training = [module for module in root.modules() if module.training]
    device = next(root.parameters()).device
    try:
        root.eval()
        if isinstance(inputs, Mapping):
            root(**{key: t.to(device) if isinstance(t, Tensor) else t for key, t in inputs.items()})
        else:
            root(inputs.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return [names for names in seen.values() if len(names) > 1 and all(calls[name] == 1 for name in names)]


def ungroup(model: nn.Module) -> None:
    """Have all layers compute alone again."""
    for layer in list(unwrapped(model).modules()):
        if isinstance(layer, GroupedLoRALinear):
            layer.projections.dissolve()
