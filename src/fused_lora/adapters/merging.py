"""Adapters folded into the weights of a whole model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fused_lora.adapters.holders import adapter_names, all_holders, held, named_holders, naming
from fused_lora.adapters.model import checked_names
from fused_lora.adapters.wrappers import is_sharded, unwrapped
from fused_lora.nn.by_name import ActiveAdapter, as_list


@contextmanager
def merged(model: nn.Module, adapter_name: str | list[str] | None = None) -> Iterator[nn.Module]:
    """Run with an adapter folded into the weights: every layer is one GEMM, and `model.state_dict()` is that of the
    plain model. Where a merged weight was tied to another one, as an output head to the embedding, a transformers
    model's configuration says that it no longer is.

    On leaving, also by an exception, every base weight, the active adapters and the configuration are restored bit for
    bit.

    Args:
        model: a model with adapters, none of them merged, not sharded and not offloaded.
        adapter_name: the adapter to merge, or a list of some; None takes the active ones.
    Raises: ValueError for an unknown adapter, none active, a layer that is merged already, a sharded model, weights
        that are elsewhere, or a merged weight that is not finite.
    """
    root = unwrapped(model)
    if is_sharded(model):
        raise ValueError(
            "model must not be sharded to be merged, no process has the whole weights: save_adapter and merge a plain "
            "copy; got a sharded one"
        )
    layers, wrappers = all_holders(root)
    before = {name: holder.active_adapter for name, holder in named_holders(root).items()}
    choose_to_merge(root, adapter_name)
    try:
        for wrapper in wrappers.values():
            wrapper.merge()
        for name, layer in layers.items():
            layer.shows_plain = True
            if layer.active_adapter is not None:
                with naming(name):
                    layer.merge()
        with saying_untied(root):
            yield model
    finally:
        for layer in layers.values():
            layer.shows_plain = False
            if layer.merged:
                layer.unmerge()
        for wrapper in wrappers.values():
            wrapper.unmerge()
        for name, holder in named_holders(root).items():
            holder.active_adapter = before[name]


def choose_to_merge(root: nn.Module, adapter_name: ActiveAdapter) -> None:
    """Have the adapter act that is to be merged, the active one if the name is None, without touching requires_grad, so
    an optimizer sees no change. Raises: ValueError as `merged`, but for values that are not finite; nothing changes
    then."""
    holders = named_holders(root)
    if not holders:
        raise ValueError("model must have adapters of this library; got one without")
    checked_names(root, adapter_name)
    if adapter_name is None and all(holder.active_adapter is None for holder in holders.values()):
        raise ValueError(f"adapter_name must be one of {adapter_names(root)} while no adapter is active; got None")
    chosen = {name: holder.active_adapter for name, holder in holders.items()}
    if adapter_name is not None:
        chosen = {name: held(adapter_name, holder) for name, holder in holders.items()}
    for name, holder in holders.items():
        if holder.merged:
            raise ValueError(f"{name} must not be merged yet; got adapter {holder.active_adapter!r} merged")
        with naming(name):
            holder.check_mergeable(as_list(chosen[name]))
    for name, holder in holders.items():
        holder.active_adapter = chosen[name]


def _ends(root: Any) -> list[Any]:
    """The weights of a transformers model's output head and of its embedding, None where there is none."""
    ways = (getattr(root, f"get_{which}_embeddings", None) for which in ("output", "input"))
    return [getattr(way and way(), "weight", None) for way in ways]


def tell_untied(root: Any) -> None:
    """Have a transformers model's configuration say so if its output head no longer has its embedding's weight."""
    if not getattr(getattr(root, "config", None), "tie_word_embeddings", False):
        return
    head, vocabulary = _ends(root)
    if head is not None and vocabulary is not None and head is not vocabulary:
        root.config.tie_word_embeddings = False


def untie(root: Any) -> None:
    """`tell_untied`, for good: what is still tied, as embeddings of encoder and decoder are, has a weight of its own
    then, since who reads the model ties none of it."""
    tell_untied(root)
    if getattr(getattr(root, "config", None), "tie_word_embeddings", True):
        return
    ends, seen = {id(weight) for weight in _ends(root) if weight is not None}, set[int]()
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in ends & seen:
                module.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))


def untied(root: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a merged model that is no longer tied, as `untie` would leave it; another one's as it is."""
    if getattr(root.config, "tie_word_embeddings", True):
        return state_dict
    ends, seen = {weight.data_ptr() for weight in _ends(root) if weight is not None}, set[int]()
    own = {}
    for key, tensor in state_dict.items():
        place = tensor.data_ptr()
        own[key] = tensor.clone() if place in ends & seen else tensor
        seen.add(place)
    return own


@contextmanager
def saying_untied(root: Any) -> Iterator[None]:
    """Inside, `tell_untied` holds; on leaving the configuration is what it was."""
    config: Any = getattr(root, "config", None)
    tied = getattr(config, "tie_word_embeddings", False)
    tell_untied(root)
    try:
        yield
    finally:
        if tied:
            config.tie_word_embeddings = tied
