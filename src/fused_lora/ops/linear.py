"""lora_linear(): the op; every check once, before anything is computed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from fused_lora.backends import Serving, forget, pick
from fused_lora.ops.autocast import cast_inputs
from fused_lora.ops.autograd import linear_apply, matrix, needs_plain_operators, nobody_listens
from fused_lora.ops.checks import check_out_norm, check_variant, fault
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.eager import eager_apply, eager_variant_apply, without_gradients
from fused_lora.ops.internals import PLAIN_TENSORS, alike, any_autocast_enabled, forward_ad_active
from fused_lora.ops.reference import PLAIN, Variant, composition
from fused_lora.ops.schema import aligned, request_of
from fused_lora.ops.sharded import on_shards


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
    x_lora: Tensor | None = None,
    h_in: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: Tensor | None = None,
    grad_row_scale: Tensor | None = None,
    return_h: bool = False,
    out_norm: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer with a LoRA update: y = x Wt + scaling * dropout(x) At Bt + bias.

    Equivalent to::

        y = F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout_p, training), lora_A), lora_B)

    and, with the optional tensors,
    ``y = out_scale * (x Wt + scaling * ((x_lora At + h_in) * gate) Bt) + bias``.
    Differentiable in every tensor but `grad_row_scale` and `out_norm`, its gradients once more through the composition.
    Under autocast x, weight and bias are cast as `torch.nn.Linear` casts them. Products accumulate in fp32;
    h = scaling * dropout(x) At is rounded to x's dtype.

    Args:
        x: [..., K], bf16, fp16 or fp32 (fp64 on the reference back end), any strides, zero rows allowed.
        weight: [N, K], x's dtype.
        lora_A, lora_B: [R, K] and [N, R], both in x's dtype or both fp32.
        scaling: lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)); a float or a 0-d tensor, which does not recompile a
            graph when it changes.
        bias: [N], x's dtype.
        dropout_p: probability of zeroing an element of the low-rank path's input, in [0, 1), resolved to 1.5e-5. The
            mask is drawn from PyTorch's default generator and regenerated in the backward.
        training: dropout acts only if true.
        backend: auto, cuda, triton, cpu or reference, or a back end and one of its plans, such as "cpu:inside". "auto"
            falls back to the PyTorch composition where no fused kernel serves the request; a named back end raises
            instead.
        x_lora: x's shape, input of the low-rank path instead of x (ResLoRA).
        h_in: [..., R], added to x_lora At (ResLoRA).
        gate: [..., k] with k dividing R, a factor for each block of R / k ranks (LoRA-Flow, per-adapter scale).
        out_scale: [N] fp32 (DoRA). Its gradient is computed from y, or from y computed again where that was changed in
            place (under torch.compile and dispatch modes the backward raises then).
        grad_row_scale: [N] fp32, scales the rows of dy for dA and dB only (ALLoRA).
        return_h: return (y, h) with h = dropout(x_lora) At [..., R], without scaling, h_in and gate.
        out_norm: [N] fp32, without a gradient: `out_scale / out_norm` takes the place of out_scale (DoRA's m / n), for
            a node of the graph less.
    Returns: y [..., N] in x's dtype, or (y, h).
    Raises: ValueError naming the argument, what was expected and what was given.
    Source: Hu et al., arXiv 2106.09685; names as in Hugging Face PEFT.
    """
    if any_autocast_enabled():
        x, (lora_A,), (lora_B,), others = cast_inputs(x, [lora_A], [lora_B], weight, bias, x_lora, h_in)
        weight, bias, x_lora, h_in = others
    if type(scaling) is not float:
        lora_A, lora_B, scaling = tensor_scaling(lora_A, lora_B, scaling)
    plain = (not return_h and out_norm is None) and (
        x_lora is None and h_in is None and gate is None and out_scale is None and grad_row_scale is None
    )
    serving, variant = None, PLAIN if plain else Variant(x_lora, h_in, gate, out_scale, grad_row_scale)
    if is_dynamo_compiling() or forward_ad_active():
        pass
    elif plain:
        serving = eager_serving(x, weight, lora_A, lora_B, bias, dropout_p, backend)
    else:
        serving = _variant_serving(x, weight, lora_A, lora_B, bias, dropout_p, backend, variant, out_norm, return_h)
    if serving is not None:
        seed = draw_seed(x, dropout_p) if dropout_p > 0.0 and training else None
        if plain:
            apply = eager_apply if torch.is_grad_enabled() else without_gradients
            return apply(x, lora_A, lora_B, (weight, bias, seed, scaling, dropout_p, serving))
        if return_h:
            gate, scaling = _folded(x, gate, scaling), 1.0
        ends = grad_row_scale, out_norm, seed, scaling, dropout_p, serving, return_h, torch.is_grad_enabled()
        made: Any = eager_variant_apply(x, lora_A, lora_B, x_lora, h_in, gate, out_scale, (weight, bias, *ends))
        return (made[0], made[1].view(*x.shape[:-1], lora_A.shape[0])) if return_h else made
    error = fault(x, weight, lora_A, lora_B, bias, dropout_p, backend)
    if error is not None:
        raise error
    if not plain:
        check_variant(x, weight, lora_A, variant)
    if out_norm is not None:
        check_out_norm(x, out_norm, out_scale)
        variant = variant._replace(out_scale=cast(Tensor, out_scale) / out_norm)
    dropout_p = dropout_p if training else 0.0
    if needs_plain_operators(*[t for t in (x, weight, lora_A, lora_B, bias, *variant) if t is not None]):
        return _composed(x, weight, lora_A, lora_B, bias, scaling, dropout_p, backend, variant, return_h)
    if return_h:
        variant, scaling = variant._replace(gate=_folded(x, gate, scaling)), 1.0
    rows = [t if t is None else matrix(t) for t in variant[:3]]
    settings = draw_seed(x, dropout_p), (scaling, dropout_p, backend)
    y, h = linear_apply(x, weight, lora_A, lora_B, bias, *rows, *variant[3:], *settings)
    return (y, h.view(*x.shape[:-1], lora_A.shape[0])) if return_h else y


class _Verdict(NamedTuple):
    """That a call is right and nobody listens, as long as its tensors are alike: all that a later call has to check."""

    alike: Callable[..., bool]
    biased: bool
    backend: str
    servings: dict[int, Serving]  # by the number of x's elements


def _keep(cache: dict, key: Any, value: Any, most: int) -> None:
    """Ever new keys must not fill the memory."""
    if len(cache) >= most:
        cache.clear()
    cache[key] = value


# By the address of lora_A: whatever else lies there later is either alike, too, or checked anew.
_VERDICTS: dict[int, _Verdict] = {}


def eager_serving(x, weight, lora_A, lora_B, bias, dropout_p, backend) -> Serving | None:
    """Who serves a call with plain tensors; None if somebody listens, see `nobody_listens`.

    Raises: ValueError if an argument is wrong or the back end refuses.
    """
    verdict = _VERDICTS.get(id(lora_A))
    if verdict is not None:
        same, biased, known, servings = verdict
        if (
            backend == known
            and (same(x, weight, lora_A, lora_B, bias) if biased else bias is None and same(x, weight, lora_A, lora_B))
            and type(dropout_p) in (float, int)
            and 0.0 <= dropout_p < 1.0
            and (weight.is_cpu or aligned(weight))
        ):
            elements = x.numel()
            if elements not in servings:
                _keep(servings, elements, pick(backend, request_of(x, weight, lora_A, PLAIN)), 128)
            return servings[elements]
    if not nobody_listens(x, weight, lora_A, lora_B, bias):
        return None
    error = fault(x, weight, lora_A, lora_B, bias, dropout_p, backend)
    if error is not None:
        raise error
    request = request_of(x, weight, lora_A, PLAIN)
    serving = pick(backend, request)
    if (request.aligned or weight.is_cpu) and x.layout is torch.strided:
        check = alike(x, weight, lora_A, lora_B) if bias is None else alike(x, weight, lora_A, lora_B, bias)
        if check is not None:
            _keep(_VERDICTS, id(lora_A), _Verdict(check, bias is not None, backend, {x.numel(): serving}), 4096)
    return serving


# By the address of the weight and by what is given; factors and gates are made anew in each call by some variants.
_VARIANT_VERDICTS: dict[tuple, _Verdict] = {}


def _variant_serving(
    x, weight, lora_A, lora_B, bias, dropout_p, backend, variant, out_norm, return_h
) -> Serving | None:
    """`eager_serving` of a call with optional tensors."""
    if type(weight) not in PLAIN_TENSORS:  # which may have no address
        return None
    x_lora, h_in, gate, *ends = variant
    optional = x_lora, h_in, gate, weight, lora_A, lora_B, bias, *ends, out_norm
    given = [t for t in optional if t is not None]
    try:
        key = (weight.data_ptr(), x.dim(), x.requires_grad, lora_A.shape, return_h, *[t is None for t in optional])
        verdict = _VARIANT_VERDICTS.get(key)
        known = verdict is not None and backend == verdict.backend and verdict.alike(x, *given)
    except (AttributeError, TypeError, RuntimeError):  # no tensor, which the caller says, or none with memory
        return None
    if (
        verdict is None
        or not known
        or any(t is not None and t.shape[:-1] != x.shape[:-1] for t in (x_lora, h_in, gate))
        or type(dropout_p) not in (float, int)
        or not 0.0 <= dropout_p < 1.0
        or not (weight.is_cpu or aligned(weight))
    ):
        verdict = _variant_verdict(x, weight, lora_A, lora_B, bias, dropout_p, backend, variant, out_norm)
        if verdict is None:
            return None
        _keep(_VARIANT_VERDICTS, key, verdict, 4096)
    elements = x.numel()
    if elements not in verdict.servings:
        asked = variant._replace(gate=x) if return_h else variant  # the scaling becomes a gate
        _keep(verdict.servings, elements, pick(backend, request_of(x, weight, lora_A, asked)), 128)
    return verdict.servings[elements]


def _variant_verdict(x, weight, lora_A, lora_B, bias, dropout_p, backend, variant, out_norm) -> _Verdict | None:
    """That a call with optional tensors is right; None if somebody listens, or if no later call could be compared with
    it.

    Raises: ValueError if an argument is wrong.
    """
    rows = [t for t in variant[:3] if t is not None]
    ends = [t for t in (*variant[3:], out_norm) if t is not None]
    row_scale = variant.grad_row_scale
    if not nobody_listens(x, weight, lora_A, lora_B, bias, *rows, *ends) or (
        row_scale is not None and row_scale.requires_grad
    ):
        return None
    error = fault(x, weight, lora_A, lora_B, bias, dropout_p, backend)
    if error is not None:
        raise error
    check_variant(x, weight, lora_A, variant)
    if out_norm is not None:
        check_out_norm(x, out_norm, variant.out_scale)
    others = [weight, lora_A, lora_B, *([] if bias is None else [bias]), *ends]
    dense = all(t.layout is torch.strided for t in (x, *rows, *others))
    usual = dense and (weight.is_cpu or aligned(weight)) and not needs_plain_operators(x, weight, lora_A, lora_B)
    check = alike(x, *rows, *others, rows=1 + len(rows)) if usual else None
    return None if check is None else _Verdict(check, bias is not None, backend, {})


def _folded(x: Tensor, gate: Tensor | None, scaling: float) -> Tensor:
    """The gate with the scaling in it, so that h comes without."""
    return x.new_full((*x.shape[:-1], 1), scaling, dtype=torch.float32) if gate is None else gate * scaling


def forget_verdicts() -> None:
    """Ask anew who serves each call, see `backends.forget`."""
    _VERDICTS.clear()
    _VARIANT_VERDICTS.clear()
    forget()


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Dropout's seed from PyTorch's default generator, None if no element would be dropped."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout_threshold(dropout_p) else None


def _composed(x, weight, lora_A, lora_B, bias, scaling, dropout_p, backend, variant, return_h):
    """The op in plain PyTorch operators, for who must see them; on DTensors the op of each process's part."""
    if not return_h and all(t is None for t in variant):
        op = partial(lora_linear, scaling=scaling, dropout_p=dropout_p, backend=backend)
        y = on_shards(op, x, weight, lora_A, lora_B, bias)
        if y is not None:
            return y
    under = "under torch.func, torch.export, torch.jit.trace, forward-mode derivatives or a tensor subclass"
    given = f"for x, a {type(x).__name__}, and weight, a {type(weight).__name__}"
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend must be 'auto' or 'reference' {under}; got {backend!r} {given}")
    scale = variant.grad_row_scale
    if scale is not None:
        raise ValueError(f"grad_row_scale must be None {under}; got a tensor {list(scale.shape)} {given}")
    mask = F.dropout(torch.ones_like(x), dropout_p) if dropout_p > 0.0 else None
    y, h = composition(x, weight, lora_A, lora_B, bias, scaling, mask, variant)
    return (y, h) if return_h else y


def tensor_scaling(lora_A: Tensor, lora_B: Tensor, scaling) -> tuple[Tensor, Tensor, float]:
    """A scaling that is no Python float: a tensor moves into A, both factors in fp32, so nothing is read on the host
    and it may train."""
    if not isinstance(scaling, Tensor):
        try:
            return lora_A, lora_B, float(scaling)
        except (TypeError, ValueError):
            raise ValueError(f"scaling must be a number or a 0-d tensor; got {scaling!r}") from None
    if scaling.dim() != 0:
        raise ValueError(f"scaling must be a number or a 0-d tensor; got a tensor of shape {list(scaling.shape)}")
    if not (isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor)):
        return lora_A, lora_B, 1.0  # refused by who asks
    if lora_A.dtype is lora_B.dtype and lora_A.dtype is not torch.float64:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    return lora_A * scaling, lora_B, 1.0
