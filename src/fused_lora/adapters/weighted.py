"""One adapter made of several, with weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_lora.adapters.holders import Layers, adapter_names, all_holders, copy_saved
from fused_lora.adapters.model import check_addable
from fused_lora.adapters.wrappers import unwrapped
from fused_lora.config import STARTS_OF_WEIGHTS, check_adapter_name, unknown_name
from fused_lora.layer_config import LayerConfig, finite_numbers
from fused_lora.nn import LoRALayer
from fused_lora.nn.conv import LoRAConv
from fused_lora.nn.experts import LoRAParameter

Weighted = list[tuple[Tensor, Tensor, float]]  # A, B, and weight times scaling
_TYPES = ("linear", "cat", "svd")


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> None:
    """Add an adapter that is the weighted sum of others, frozen until `set_adapter` makes it active.

    Equivalent to, for the update of every layer in which some of the adapters sit::

        cat     sum(weight * scaling * B A): exact, of rank sum(r)
        svd     the nearest to that sum of rank svd_rank
        linear  sum(root * B) sum(sign * root * A) with root = sqrt(|weight * scaling|): of the adapters' rank, rough

    Its scaling is 1, its dropout the first adapter's. A module that one of the adapters trains a copy of has that copy.

    Args:
        model: a model with these adapters.
        adapters: their names.
        weights: a number, of either sign, for each.
        adapter_name: the new adapter's name.
        combination_type: as above; a single adapter is combined as "linear".
        svd_rank: rank for "svd", None for the largest of the adapters' ranks.
    Raises: ValueError naming the argument, what was expected and what was given; nothing changes then.
    Source: Hugging Face PEFT's add_weighted_adapter.
    """
    root = unwrapped(model)
    check_addable(model)
    check_adapter_name(adapter_name)
    weights = _checked_weights(root, adapters, weights, adapter_name, combination_type)
    kind = combination_type if len(adapters) > 1 else "linear"
    layers, wrappers = all_holders(root)
    layers = {name: layer for name, layer in layers.items() if any(adapter in layer.lora_A for adapter in adapters)}
    for name, wrapper in wrappers.items():
        found = [adapter for adapter in adapters if adapter in wrapper.modules_to_save]
        if len(found) > 1:
            raise ValueError(f"adapters must not train several copies of one module; got {len(found)} of {name}")
    rank = _rank(layers, adapters, kind, svd_rank)
    factors = {name: _combined(name, layer, adapters, weights, kind, rank) for name, layer in layers.items()}
    dropout_p = next(layer.lora_dropout[adapters[0]] for layer in layers.values() if adapters[0] in layer.lora_dropout)
    for name, layer in layers.items():
        dtype = factors[name][0].dtype
        layer.add_adapter(adapter_name, rank, lora_alpha=rank, lora_dropout=dropout_p, adapter_dtype=dtype)
        layer.lora_A[adapter_name].copy_(factors[name][0])
        layer.lora_B[adapter_name].copy_(factors[name][1])
    for adapter in adapters:
        copy_saved(wrappers, adapter, adapter_name)


def _checked_weights(root: nn.Module, adapters, weights, adapter_name: str, combination_type: str) -> list[float]:
    """The weights as floats, if they and the other arguments can be."""
    known = adapter_names(root)
    if adapter_name in known:
        raise ValueError(f"adapter_name must be new to the model, which has {known}; got {adapter_name!r}")
    for adapter in adapters:
        if adapter not in known:
            raise unknown_name("adapters", adapter, known)
    if not adapters or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters must be different names, one at least; got {list(adapters)}")
    if combination_type not in _TYPES:
        raise ValueError(f"combination_type must be one of {', '.join(_TYPES)}; got {combination_type!r}")
    return finite_numbers("weights", weights, len(adapters))


def _rank(layers: Layers, adapters: Sequence[str], kind: str, svd_rank: int | None) -> int:
    """One rank for all layers, as PEFT has it; in layers with fewer the rest is zero."""
    ranks = [max(layer.r[name] for layer in layers.values() if name in layer.r) for name in adapters]
    if kind == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"adapters must have one rank for combination_type 'linear'; got {ranks}")
    if kind == "svd" and svd_rank is not None:
        return LayerConfig(r=svd_rank).r
    return sum(ranks) if kind == "cat" else max(ranks)


def _combined(
    name: str, layer: LoRALayer, adapters: Sequence[str], weights: Sequence[float], kind: str, rank: int
) -> tuple[Tensor, Tensor]:
    """A and B of the new adapter in a layer. Raises: ValueError for a layer whose adapters are no plain factors."""
    held = [(adapter, weight) for adapter, weight in zip(adapters, weights) if adapter in layer.lora_A]
    given: Weighted = [
        (layer.lora_A[adapter], layer.lora_B[adapter], weight * float(layer.scaling[adapter]))
        for adapter, weight in held
    ]
    if isinstance(layer, LoRAParameter) or (isinstance(layer, LoRAConv) and kind != "linear" and layer.groups > 1):
        raise ValueError(
            f"adapters must sit in modules that have no experts and no groups to be combined as {kind!r}; got {name}, "
            f"{layer.extra_repr()}"
        )
    for adapter, _ in held:
        if (start := layer.init_lora_weights[adapter]) in STARTS_OF_WEIGHTS:
            raise ValueError(
                "adapters must have left the base weight as it was to be combined, a file of their sum would count "
                f"twice what they took out of it; got {adapter!r} with init_lora_weights={start!r}"
            )
        if adapter in layer.lora_magnitude_vector:
            raise ValueError(
                f"adapters must be plain LoRA to be combined, the sum of DoRA adapters is none; got {adapter!r}, DoRA "
                f"in {name}"
            )
        if adapter in layer.lora_bias:
            raise ValueError(
                f"adapters must have no lora_bias to be combined; got {adapter!r}, which has one in {name}"
            )
    if any(t.is_meta for lora_A, lora_B, _ in given for t in (lora_A, lora_B)):
        raise ValueError(f"adapters must have values to be combined; got {name} on the meta device")
    if kind == "linear" and len({lora_A.shape for lora_A, *_ in given}) > 1:
        ranks = [layer.r[adapter] for adapter, _ in held]
        raise ValueError(f"adapters must have one rank in {name} for combination_type 'linear'; got {ranks}")
    shape_A, shape_B = layer.adapter_shapes(rank)
    lora_A, lora_B = {"linear": _linear, "cat": _cat, "svd": _svd}[kind](given)
    lora_A, lora_B = lora_A[:rank], lora_B[:, :rank]  # largest first, if one is cut
    new_A, new_B = lora_A.new_zeros(rank, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], rank)
    new_A[: len(lora_A)], new_B[:, : lora_B.shape[1]] = lora_A, lora_B
    dtype = given[0][0].dtype
    return new_A.view(shape_A).to(dtype), new_B.view(shape_B).to(dtype)


def _linear(given: Weighted) -> tuple[Tensor, Tensor]:
    lora_A = sum(math.copysign(math.sqrt(abs(weight)), weight) * A.flatten(1) for A, _, weight in given)
    lora_B = sum(math.sqrt(abs(weight)) * B.flatten(1) for _, B, weight in given)
    return torch.as_tensor(lora_A), torch.as_tensor(lora_B)


def _cat(given: Weighted) -> tuple[Tensor, Tensor]:
    above = torch.cat([weight * A.flatten(1) for A, _, weight in given])
    return above, torch.cat([B.flatten(1) for _, B, _ in given], dim=1)


def _svd(given: Weighted) -> tuple[Tensor, Tensor]:
    """The singular value decomposition of the sum, by that of a matrix of its own rank: B A = Q (R1 R2t) Pt."""
    lora_A, lora_B = (t.double() for t in _cat(given))
    (Q, R1), (P, R2) = torch.linalg.qr(lora_B), torch.linalg.qr(lora_A.t())
    U, S, Vt = torch.linalg.svd(R1 @ R2.t(), full_matrices=False)
    return Vt @ P.t(), (Q @ U) * S
