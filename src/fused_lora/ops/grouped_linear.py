"""grouped_lora_linear(): a frozen linear layer with adapters of their own for segments of the rows, for the layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from fused_lora.backends import GROUPED, Request, bucket, cpu_grouped, cpu_product, pick
from fused_lora.ops.autograd import matrix, nobody_listens
from fused_lora.ops.checks import grouped_fault
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.grouped import gradients, grouped_lora_update
from fused_lora.ops.internals import (
    alike,
    any_autocast_enabled,
    dispatch_modes_active,
    forward_ad_active,
    function_apply,
    linear_with_bias,
    reshaped,
    wants_operators,
    without_autocast,
)
from fused_lora.ops.linear import draw_seed
from fused_lora.ops.remembered import remembered
from fused_lora.ops.schema import aligned


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    offsets: Tensor,
    rows: Tensor | None,
    dropout_p: Sequence[float],
) -> Tensor:
    """A linear layer and the update of each group of its rows.

    Equivalent to ``grouped_lora_update(F.linear(x, weight, bias), x, lora_A, lora_B, scaling, offsets, rows=rows,
    dropout_p=dropout_p)``, but for a rounding less of dx. Where nobody listens on the CPU, the updates of y and dx are
    added to the base products where they lie, and nothing is checked twice: neither tensors like those of an earlier
    call, nor the values of the segments.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        lora_A, lora_B: G tensors [R_g, K] and [N, R_g].
        scaling, dropout_p: G numbers.
        offsets: int64 [G + 1], right for x: the caller has made them so.
        rows: int64 [M'], likewise, or None.
    Returns: [..., N].
    """
    serving = _serving(x, weight, bias, lora_A, lora_B, offsets, rows)
    if serving is None:
        y = F.linear(x, weight, bias)
        return grouped_lora_update(y, x, lora_A, lora_B, scaling, offsets, rows=rows, dropout_p=dropout_p)
    ps = list(dropout_p) if any(dropout_p) and any(map(dropout_threshold, dropout_p)) else []
    segments = _numbers(tuple(scaling)), offsets, rows, draw_seed(x, max(ps)) if ps else None
    call = serving, weight, bias, segments, (len(lora_A), ps, "auto")
    if torch.is_grad_enabled():
        return _apply(call, x, *lora_A, *lora_B)
    return _forward(call, x, lora_A, lora_B)[0]


class _Verdict(NamedTuple):
    """That a call is right and nobody listens, as long as its tensors are alike."""

    alike: Callable[..., bool]
    biased: bool
    layout: cpu_grouped.Layout
    requests: dict[int, tuple[Request, Request]]  # by M's bucket: of the groups, and of plain LoRA


# By the address of the first A and the number of groups: what else lies there later is either alike, or checked anew.
_VERDICTS: dict[tuple[int, int], _Verdict] = {}

_Serving = tuple[Any, bool, cpu_grouped.Layout]


def _serving(x, weight, bias, lora_A, lora_B, offsets, rows) -> _Serving | None:
    """The CPU back end, whether the base product is its own, as plain LoRA's is, and the factors' layout; None if it
    does not serve the call or somebody listens."""
    if is_dynamo_compiling() or not x.is_cpu or any_autocast_enabled() or forward_ad_active():
        return None
    key, given = (id(lora_A[0]), len(lora_A)), (x, weight, *lora_A, *lora_B)
    verdict = _VERDICTS.get(key)
    tensors = given if bias is None else (*given, bias)
    if verdict is None or verdict.biased != (bias is not None) or not verdict.alike(*tensors):
        check = _checked(x, weight, bias, lora_A, lora_B, offsets, rows)
        if check is None:
            return None
        if len(_VERDICTS) > 1024:
            _VERDICTS.clear()
        layout = cpu_grouped.Layout(lora_A, lora_B, len(lora_A))
        _VERDICTS[key] = verdict = _Verdict(check, bias is not None, layout, {})
    M = bucket(x.numel() // x.shape[-1])
    requests = verdict.requests.get(M)
    if requests is None:
        (N, K), R = weight.shape, verdict.layout.R
        grouped = Request(x.device, x.dtype, lora_A[0].dtype, M, N, K, R, aligned(weight), GROUPED)
        requests = verdict.requests[M] = grouped, grouped._replace(optional=())
    back_end = pick("auto", requests[0]).backend
    if not hasattr(back_end, "grouped_update_onto"):
        return None
    own = pick("auto", requests[1]) == (back_end, "inside") and cpu_product.serves(x.dtype)
    return back_end, own, verdict.layout


def _checked(x, weight, bias, lora_A, lora_B, offsets, rows) -> Callable[..., bool] | None:
    """A check whether other tensors are like these; None where these are not right, or somebody listens."""
    if any(not nobody_listens(x, weight, A, B, bias) for A, B in zip(lora_A, lora_B)):
        return None
    if x.layout is not torch.strided or weight.dim() != 2 or x.dim() < 2 or weight.dtype is not x.dtype:
        return None
    N, K = weight.shape
    if x.shape[-1] != K or (bias is not None and (bias.shape != (N,) or bias.dtype is not x.dtype)):
        return None
    y = x.new_empty((1, N)).expand(*x.shape[:-1], N)
    if grouped_fault(y, x, lora_A, lora_B, 1.0, offsets, rows, 0.0, "auto") is not None or lora_A[0].dim() != 2:
        return None
    tensors = (weight, *lora_A, *lora_B)
    return alike(x, *tensors) if bias is None else alike(x, *tensors, bias)


@remembered
def _numbers(values: tuple[float, ...]) -> Tensor:
    """Numbers in a tensor, which all layers with them share."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _forward(call, x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """y [..., N] and h [M', R]."""
    (back_end, own, layout), weight, bias, (scaling, offsets, rows, seed), (_, ps, _) = call
    flat = matrix(x)
    if own:
        y = cpu_product.product(flat, weight, bias)
    else:
        y = F.linear(flat, weight) if bias is None else linear_with_bias(flat, weight, bias)
    h = back_end.grouped_update_onto(y, flat, lora_A, lora_B, scaling, offsets, rows, ps, seed, layout)
    return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], y.shape[1])), h


class _GroupedLinearFunction(torch.autograd.Function):
    """y [..., N], straight from the back end; saves x and h, each only if a needed gradient uses it."""

    @staticmethod
    def forward(ctx, call, x, *factors):
        _, weight, _, segments, settings = call
        split = settings[0]
        y, h = _forward(call, x, factors[:split], factors[split:])
        needs = ctx.needs_input_grad[2:]
        kept = x if any(needs[:split]) else None, h if any(needs[split:]) else None
        ctx.save_for_backward(weight, *kept, *factors)
        ctx.call = call[0], segments, settings, x.shape[:-1]
        return y

    @staticmethod
    def backward(ctx, dy):
        weight, x, h, *factors = ctx.saved_tensors
        (back_end, own, layout), segments, settings, lead = ctx.call
        split, ps, _ = settings
        dy, needs = matrix(dy), list(ctx.needs_input_grad[1:])
        if torch.is_grad_enabled() or dispatch_modes_active() or any_autocast_enabled() or wants_operators(dy):
            dx, *others = gradients((x, h, *segments, *factors), settings, dy, needs)
            with without_autocast(dy):
                dx = dx if dx is None else dx + dy @ weight
        else:
            x = x if x is None else matrix(x)
            dx = None
            if needs[0]:
                dx = cpu_product.product(dy, weight.t()) if own else dy.mm(weight)
            given = dy, x, factors[:split], factors[split:], h, *segments[:3], ps, segments[3]
            dx, *others = back_end.grouped_backward_onto(dx, *given, needs, layout)
        return None, dx if dx is None or len(lead) == 1 else dx.view(*lead, dx.shape[1]), *others


_apply = function_apply(_GroupedLinearFunction)
