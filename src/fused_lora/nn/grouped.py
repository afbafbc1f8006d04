"""LoRALinears of one x, such as the projections to queries, keys and values, that compute together."""

from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fused_lora.nn.linear import LoRALinear
from fused_lora.ops.internals import any_autocast_enabled, layer_tensors
from fused_lora.ops.projections import Projection, lora_projections


class _Ready(NamedTuple):
    """What the first of the layers has computed for the others."""

    x: Tensor
    version: int
    projections: list[Projection]  # what they were computed from, so that no other tensor gets an id of one of these
    made_of: dict[int, tuple | None]  # by the layer's id
    ys: dict[int, Tensor]  # likewise, each once


class Projections:
    """The layers of a group: the first one that is called computes all, the others take their part if they are given
    the very same tensor, unchanged, and are themselves as they were then, and not under autocast, under which the first
    computes alone; else they compute alone, from then on all of them. One that is called without gradients computes
    alone.

    Args:
        layers: the LoRALinears in the order of their calls, all in `parent`.
        parent: the module whose forward calls them; at its end nothing is kept.
    """

    def __init__(self, layers: list[LoRALinear], parent: nn.Module):
        self._layers, self._apart = layers, False
        self._ready: dict[int, _Ready] = {}  # by thread
        self._hook = parent.register_forward_hook(self._drop, always_call=True)
        for layer in layers:
            layer.__class__ = GroupedLoRALinear
            vars(layer)["projections"] = self

    def of(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """The layer's y of x, or None where it has to compute alone."""
        if self._apart or is_dynamo_compiling() or not torch.is_grad_enabled():
            return None
        thread = get_ident()
        ready = self._ready.pop(thread, None)
        if ready is not None and id(layer) in ready.ys:
            stale = ready.x is not x or ready.version != x._version or ready.made_of[id(layer)] != _made_of(layer)
            if stale or any_autocast_enabled():  # what is ready is without
                self._apart = True
                return None
            y = ready.ys.pop(id(layer))
            if ready.ys:
                self._ready[thread] = ready
            return y
        if not all(map(_is_plain, self._layers)) or x.is_inference():
            return None
        projections = [_projection(each) for each in self._layers]
        ys = lora_projections(x, projections)
        if ys is None:
            return None
        by_layer = {id(each): y for each, y in zip(self._layers, ys)}
        y = by_layer.pop(id(layer))
        made_of = {id(each): _made_of(each) for each in self._layers if each is not layer}
        self._ready[thread] = _Ready(x, x._version, projections, made_of, by_layer)
        return y

    def _drop(self, *_: Any) -> None:
        if not is_dynamo_compiling():
            self._ready.pop(get_ident(), None)

    def dissolve(self) -> None:
        """The layers are LoRALinears again."""
        self._hook.remove()
        for layer in self._layers:
            layer.__class__ = LoRALinear
            del vars(layer)["projections"]


class GroupedLoRALinear(LoRALinear):
    """A LoRALinear that belongs to a group. Made by `fused_lora.group`."""

    projections: Projections

    def forward(self, x: Tensor):
        y = self.projections.of(self, x)
        return super().forward(x) if y is None else y


def _is_plain(layer: LoRALinear) -> bool:
    """Whether one adapter acts, without a variant, and nothing but the layer's own call is needed for its tensors."""
    name = layer.active_adapter
    return (
        isinstance(name, str)
        and not layer.merged
        and layer._variant() is None
        and not layer.lora_A[name].is_meta
        and "forward" not in vars(layer)
    )


def _made_of(layer: LoRALinear) -> tuple | None:
    """What the layer computes with, as far as autograd counts writes; None where it does not compute as a plain one."""
    name = layer.active_adapter
    if type(name) is not str or layer.merged or layer._variant() is not None:
        return None
    tensors = layer_tensors(layer, name)
    how = name, layer.training, layer.scaling[name], layer.lora_dropout[name]
    return *how, *[None if t is None else (id(t), t._version) for t in tensors]


def _projection(layer: LoRALinear) -> Projection:
    name: Any = layer.active_adapter
    dropout_p = layer.lora_dropout[name] if layer.training else 0.0
    return Projection(layer.weight, layer.lora_A[name], layer.lora_B[name], layer.scaling[name], layer.bias, dropout_p)
