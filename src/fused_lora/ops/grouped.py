"""grouped_lora_update(): `lora_update` with adapters of their own for each segment of the rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fused_lora.ops import grouped_schema  # which registers torch.ops.fused_lora.grouped_update
from fused_lora.ops.again import gradients_again
from fused_lora.ops.autocast import cast_inputs
from fused_lora.ops.autograd import matrix, needs_plain_operators
from fused_lora.ops.checks import grouped_fault
from fused_lora.ops.dropout import dropout_mask, dropout_threshold
from fused_lora.ops.grouped_reference import grouped_composition, positions
from fused_lora.ops.internals import dispatch_modes_active, function_apply, reshaped, wants_operators
from fused_lora.ops.linear import draw_seed


def grouped_lora_update(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] | Tensor,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """LoRA updates on the result of somebody else's linear layer, by an adapter of its own for each group of rows.

    Equivalent to, with x and y as matrices and rows = arange(M) where it is None::

        out = y.clone()
        for g in range(G):
            at = rows[offsets[g] : offsets[g + 1]]
            out[at] = lora_update(y[at], x[at], lora_A[g], lora_B[g], scaling[g], dropout_p=dropout_p[g])

    in y's dtype and in a tensor of its own. Differentiable in y, x and every factor, its gradients once more;
    the factors of an empty group have a gradient of zero. Each group is multiplied with its own rank. Products
    accumulate in fp32; h = scaling[g] * dropout(x) At is rounded to x's dtype.

    Args:
        y: [..., N], a floating dtype; where it is not x's, the updates are computed in x's dtype and added in the wider
            one.
        x: [..., K] with y's leading dimensions, M rows, bf16, fp16 or fp32 (fp64 on the reference back end), any
            strides, zero rows allowed. Under autocast it is cast as `torch.nn.Linear` casts it.
        lora_A: G tensors [R_g, K], or one [G, R, K]; a stack [1, R, K] is shared by all groups and its gradient is
            the sum of theirs.
        lora_B: G tensors [N, R_g], or one [G, N, R] or [1, N, R]; all factors in x's dtype or all in fp32.
        scaling: a number, G numbers or a tensor [G], which is a constant.
        offsets: int64 or int32 [G + 1], ascending from 0 to M, or to M' with `rows`.
        rows: int64 or int32 [M'], the row of x and y at each position, none of them twice; rows that it does not name
            keep y. None is all rows in their order.
        dropout_p: as in `lora_linear`, for all groups or a number for each; row m of x is dropped as `lora_update` with
            the same seed would drop it.
        training, backend: as in `lora_update`.
    Returns: [..., N] in y's dtype.
    Raises: ValueError naming the argument, what was expected and what was given. The values of offsets and rows are
        checked on the CPU only.
    Source: Chen et al., "Punica: Multi-Tenant LoRA Serving", arXiv 2310.18547; Hu et al., arXiv 2106.09685.
    """
    lora_A, lora_B = _as_list("lora_A", lora_A), _as_list("lora_B", lora_B)
    x, lora_A, lora_B, _ = cast_inputs(x, lora_A, lora_B)
    ps = list(dropout_p) if isinstance(dropout_p, Sequence) else [dropout_p]
    wrong = [p for p in ps if not isinstance(p, int | float) or not 0.0 <= p < 1.0]
    error = grouped_fault(y, x, lora_A, lora_B, scaling, offsets, rows, wrong[0] if wrong else 0.0, backend)
    if error is not None:
        raise error
    G = offsets.shape[0] - 1
    if len(ps) != G and isinstance(dropout_p, Sequence):
        raise ValueError(f"dropout_p must be a number or {G} numbers to match offsets [{G + 1}]; got {len(ps)}")
    ps = ps if isinstance(dropout_p, Sequence) else ps * G
    ps = ps if training and any(map(dropout_threshold, ps)) else []
    scalings = _scalings(scaling, G, x)
    if needs_plain_operators(y, x, *lora_A, *lora_B):
        if backend not in ("auto", "reference"):
            raise ValueError(
                "backend must be 'auto' or 'reference' under torch.func transforms, forward-mode derivatives, "
                f"torch.jit.trace or a tensor subclass; got {backend!r}"
            )
        return _composed(y, x, lora_A, lora_B, scalings, offsets, rows, ps)
    into = y if y.dtype == x.dtype else torch.zeros_like(y, dtype=x.dtype)
    seed = draw_seed(x, max(ps)) if ps else None
    apply = _traced_apply if is_dynamo_compiling() else _eager_apply
    updated, _ = apply(into, x, scalings, offsets, rows, seed, (len(lora_A), ps, backend), *lora_A, *lora_B)
    return updated if into is y else (y + updated).to(y.dtype)


def _as_list(name: str, factors: Any) -> list[Tensor]:
    """The matrices of the groups, or their one stack, in a list."""
    if isinstance(factors, Tensor):
        return [factors]
    if not isinstance(factors, Sequence) or not factors:
        raise ValueError(f"{name} must be a tensor or a sequence of tensors; got {type(factors).__name__}")
    return list(factors)


def _scalings(scaling: Any, G: int, x: Tensor) -> Tensor:
    """[G], in fp32 at least, on x's device."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            raise ValueError("scaling must not require gradients, it is a constant here; got a tensor that does")
        if scaling.shape != (G,):
            raise ValueError(f"scaling must have shape [{G}] to match offsets [{G + 1}]; got {list(scaling.shape)}")
        return scaling.to(dtype)
    several = isinstance(scaling, Sequence) and not isinstance(scaling, str)
    try:
        numbers = [float(s) for s in (scaling if several else [scaling])]
    except (TypeError, ValueError):
        raise ValueError(f"scaling must be a number, {G} numbers or a tensor [{G}]; got {scaling!r}") from None
    if several and len(numbers) != G:
        raise ValueError(f"scaling must have {G} numbers to match offsets [{G + 1}]; got {len(numbers)}")
    return torch.tensor(numbers if several else numbers * G, dtype=dtype, device=x.device)


def _composed(y, x, lora_A, lora_B, scaling, offsets, rows, ps) -> Tensor:
    """The op in plain PyTorch operators, for who must see them."""
    mask = None
    if ps:
        M = x.numel() // x.shape[-1] if rows is None else rows.shape[0]
        at = torch.searchsorted(offsets, torch.arange(M, device=x.device, dtype=offsets.dtype), right=True) - 1
        keep = 1.0 - torch.tensor(ps, device=x.device)[at, None]
        mask = ((torch.rand(M, x.shape[-1], device=x.device) < keep) / keep).to(x.dtype)
    return grouped_composition(y, x, lora_A, lora_B, scaling, offsets, rows, mask).to(y.dtype)


class _GroupedFunction(torch.autograd.Function):
    """y + updates [..., N] and h [M', R] by torch.ops.fused_lora; saves x and h, each only if a needed gradient uses
    it, and never y."""

    @staticmethod
    def forward(y, x, scaling, offsets, rows, seed, settings, *factors):
        split, ps, backend = settings
        given = list(factors[:split]), list(factors[split:]), scaling, offsets, rows, ps, seed, backend
        op = torch.ops.fused_lora.grouped_update if _heard() else grouped_schema.grouped_update
        updated, h = op(matrix(y), matrix(x), *given)
        return updated if y.dim() == 2 else reshaped(updated, y.shape), h  # nobody's view

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, scaling, offsets, rows, seed, settings, *factors = inputs
        needs = ctx.needs_input_grad[7:]
        need_A, need_B = any(needs[: settings[0]]), any(needs[settings[0] :])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        kept = x if need_A else None, output[1] if need_B else None
        ctx.save_for_backward(*kept, scaling, offsets, rows, seed, *factors)
        ctx.settings, ctx.lead = settings, x.shape[:-1]

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[7:]]
        dx, *factors = (
            gradients(ctx.saved_tensors, ctx.settings, matrix(dy), needs) if any(needs) else [None] * len(needs)
        )
        if dx is not None and len(ctx.lead) != 1:
            dx = dx.view(*ctx.lead, dx.shape[1])
        return dy if ctx.needs_input_grad[0] else None, dx, None, None, None, None, None, *factors


_eager_apply = function_apply(_GroupedFunction)


def _heard() -> bool:
    """Whether somebody listens to the dispatcher, on the way through which each tensor of a list costs time."""
    return is_dynamo_compiling() or bool(dispatch_modes_active())


def _traced_apply(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Function.apply under torch.compile, which, without gradients, takes the first of a forward's *args for a ctx."""
    trains = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    return _GroupedFunction.apply(*inputs) if trains else _GroupedFunction.forward(*inputs)


def gradients(saved: Sequence[Any], settings: Any, dy: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """dx [M, K], dA and dB of each factor, None for those that are not needed.

    Args:
        saved: x, h, scaling, offsets, rows, seed and the factors, as the forward had them; x and h may be None.
        settings: how many factors A there are, the dropouts, the back end.
        dy: [M, N].
        needs: of x and each factor.
    """
    x, h, scaling, offsets, rows, seed, *factors = saved
    split, ps, backend = settings
    x, lora_A, lora_B = None if x is None else matrix(x), factors[:split], factors[split:]
    if torch.is_grad_enabled() and not is_dynamo_compiling():  # create_graph=True
        return _backward_again(dy, x, lora_A, lora_B, scaling, offsets, rows, ps, seed, needs)
    if wants_operators(dy):
        with torch.enable_grad():
            return _backward_again(dy, x, lora_A, lora_B, scaling, offsets, rows, ps, seed, needs)
    given = dy, x, lora_A, lora_B, h, scaling, offsets, rows, ps, seed, needs
    op = torch.ops.fused_lora.grouped_update_backward if _heard() else grouped_schema.grouped_update_backward
    found = iter(op(*given, backend))
    return [next(found) if need else None for need in needs]


def _backward_again(dy, x, lora_A, lora_B, scaling, offsets, rows, ps, seed, needs) -> list[Tensor | None]:
    """What the backward computes, for autograd to differentiate once more.

    Raises: RuntimeError where x is needed now and was not kept.
    """
    split, K = len(lora_A), lora_A[0].shape[-1]
    if x is None and any(needs[1 + split :]):
        raise RuntimeError("differentiating twice needs x, which is kept only where lora_A trains; lora_A is frozen")
    x = scaling.new_zeros(dy.shape[0], K, dtype=dy.dtype) if x is None else x  # no needed gradient reads it
    mask = None
    if seed is not None:
        where = torch.arange(positions(x, rows), device=x.device) if rows is None else rows
        parts = zip(ps, where.split(offsets.diff().tolist()))
        mask = torch.cat([dropout_mask(seed, len(part), K, p, dy.dtype, part) for p, part in parts])

    def outputs(x, *factors):
        zero = x.new_zeros(dy.shape)
        return (grouped_composition(zero, x, factors[:split], factors[split:], scaling, offsets, rows, mask),)

    return gradients_again(outputs, (x, *lora_A, *lora_B), needs, (dy,))
