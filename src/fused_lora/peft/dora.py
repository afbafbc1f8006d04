"""PEFT's DoRA layers on the op."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fused_lora import bases
from fused_lora.nn.magnitudes import scaled, scaled_dropping
from fused_lora.ops.linear import lora_linear
from fused_lora.peft.request import Base, Update, linear_fits, norm_source, update_fits
from fused_lora.variants.dora import Norms, RowNorm, out_scale, row_norm, row_squares, scaled_update

_norms: WeakKeyDictionary[nn.Module, RowNorm] = WeakKeyDictionary()  # by PEFT's DoraLinearLayer


def forget_norms(model: nn.Module) -> None:
    """Compute the norms of DoRA's layers anew in the next forward.

    They are kept until a parameter is seen to be written, in place or by an optimizer; what is written through
    `parameter.data` is seen on the CPU as a rule, where it is the whole of a plain tensor. After any other such write
    call this.

    Args:
        model: a PEFT model, any part of one, or a model that holds one.
    """
    for module in model.modules():
        if module in _norms:
            _norms[module].forget()


def dora_forward(layer: Any, x: Tensor, base: Base | str, update: Update) -> Tensor | None:
    """y [..., N] of x [..., K], or None where PEFT must compute it."""
    if not isinstance(base, str):
        return _linear(layer, x, base, update) if linear_fits(x, base, update) else None
    quantised = dora_base(layer)
    return None if quantised is None or not update_fits(x, update) else _around(layer, quantised, x, update)


def _linear(layer: Any, x: Tensor, base: Base, update: Update) -> Tensor:
    """By one call of the op, by two where DoRA drops from x."""
    dora: Any = update.dora
    norm = _norms_of(layer, lambda: base.weight, update)
    given = scaled_update(x, update.lora_A, update.lora_B, update.scaling, dora.weight, norm, update.dropout_p)
    y: Any = lora_linear(x, base.weight, *given[:3], bias=base.bias, **given.optional)
    more: Any = given.more
    return y if more is None else y + lora_linear(more.x, base.weight, *more[:3], **more.optional)


def _around(layer: Any, base: bases.Base, x: Tensor, update: Update) -> Tensor:
    """Over a quantised base: `lora_around`, scaled; where DoRA drops from x, the base is called twice."""
    linear = layer._modules["base_layer"]
    dora: Any = update.dora
    g = out_scale(dora.weight, _norms_of(layer, lambda: base.dense(torch.float32), update))
    lora_A, lora_B, scaling, dropout_p, *_ = update
    if dropout_p == 0.0:
        return scaled(bases.lora_around(linear, x, lora_A, lora_B, scaling), g, linear.bias)

    def product(x: Tensor) -> Tensor:
        y = linear(x)
        return y if linear.bias is None else y - linear.bias

    return scaled_dropping(linear(x), x, product, (lora_A, lora_B, scaling, dropout_p), g)


def dora_base(layer: Any) -> bases.Base | None:
    """The quantised base of a layer whose W can be read for the norms; None for any other that is no plain matrix."""
    base = bases.of(layer._modules["base_layer"])
    return base if base is not None and base.untouched() else None


def _norms_of(layer: Any, weight: Any, update: Update) -> Norms:
    """`RowNorm` of a layer and its adapter."""
    dora: Any = update.dora
    lora_A, lora_B, scaling, *_ = update
    if is_dynamo_compiling():
        with torch.no_grad():
            return row_norm(weight(), row_squares(weight()), lora_A, lora_B, scaling)
    once = _norms.get(dora)
    if once is None:
        once = _norms[dora] = RowNorm()
    return once(norm_source(layer), weight, lora_A, lora_B, scaling, layer.training)
