"""LoRALinears of one x, such as the projections to queries, keys and values, that compute together."""

from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fused_lora.nn.linear import LoRALinear
from fused_lora.ops.internals import any_autocast_enabled, layer_tensors
from fused_lora.ops.projections import Projection, lora_projections


class _Given(NamedTuple):
    """What a layer computes its y of."""

    projection: Projection
    marks: list[Any]  # what differs once that is other or written


class _Ready(NamedTuple):
    """What the first of the layers has computed for the others."""

    x: Tensor
    version: int
    needs_dx: bool
    ys: dict[int, Tensor]  # by the layer's id, each once
    givens: dict[int, _Given]  # of which they were computed


class Projections:
    """The layers of a group: the first one that is called computes all, the others take their part if they are given
    the very same tensor and are themselves as they were then, both unchanged as autograd counts writes, and not under
    autocast, under which the first computes alone; else they compute alone, from then on all of them. One that is
    called without gradients computes alone.

    Args:
        layers: the LoRALinears in the order of their calls, all in `parent`.
        parent: the module whose forward calls them; at its end nothing is kept. Where the first is called outside it,
            as in a checkpoint that computes again, what the others do not take is kept until the thread's next call.
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
            if not _fits(ready, layer, x) or any_autocast_enabled():  # what is ready is without
                self._apart = True
                return None
            y = ready.ys.pop(id(layer))
            if ready.ys:
                self._ready[thread] = ready
            return y
        if x.is_inference():
            return None
        givens: dict[int, _Given] = {}
        for each in self._layers:
            given = _given(each)
            if given is None:
                return None
            givens[id(each)] = given
        ys = lora_projections(x, [given.projection for given in givens.values()])
        if ys is None:
            return None
        by_layer = dict(zip(givens, ys))
        y = by_layer.pop(id(layer))
        self._ready[thread] = _Ready(x, x._version, x.requires_grad, by_layer, givens)
        return y

    def _drop(self, *_: Any) -> None:
        if not is_dynamo_compiling():
            self._ready.pop(get_ident(), None)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ready": {}}

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


def _fits(ready: _Ready, layer: LoRALinear, x: Tensor) -> bool:
    """Whether the layer would compute of x what is ready."""
    if ready.x is not x or ready.version != x._version or ready.needs_dx != x.requires_grad:
        return False
    given = _given(layer)
    return given is not None and given.marks == ready.givens[id(layer)].marks


def _given(layer: LoRALinear) -> _Given | None:
    """What the layer computes its y of; None unless one adapter acts, without a variant, and nothing but the layer's
    own call is needed for its tensors."""
    name: Any = layer.active_adapter
    if type(name) is not str or layer.merged or layer._variant() is not None or "forward" in vars(layer):
        return None
    weight, bias, lora_A, lora_B = layer_tensors(layer, name)
    scaling = layer.scaling[name]
    if lora_A.is_meta or type(scaling) is not float:
        return None
    dropout_p = layer.acting_dropout(name)
    marks: list[Any] = [scaling, dropout_p]
    try:
        for t in (weight, bias, lora_A, lora_B):
            if t is not None:  # they are held, so that no other gets an id of theirs
                marks += (id(t), t.data_ptr(), t._version, t.requires_grad)
    except RuntimeError:  # under torch.func they have no memory, in inference mode no count of writes
        return None
    return _Given(Projection(weight, lora_A, lora_B, scaling, bias, dropout_p), marks)
