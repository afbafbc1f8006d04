"""The maths of `grouped_lora_update` in plain PyTorch, a group after the other: ground truth and last-resort back end.

    y[rows_g] += s_g * drop(x[rows_g]) A_gt B_gt        for every group g

Factors travel as a list: one matrix a group, [R_g, K] and [N, R_g], or a single stack, [G, R, K] and [G, N, R], whose
first dimension is 1 where all groups share it. `rows_g` are the positions offsets[g] .. offsets[g + 1] - 1 of x, or of
the index `rows` into x where that is given.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops.dropout import dropout_mask


def of_group(factors: Sequence[Tensor], g: int) -> Tensor:
    """The matrix of one group."""
    if factors[0].dim() == 2:
        return factors[g]
    return factors[0][min(g, factors[0].shape[0] - 1)]


def largest_rank(lora_A: Sequence[Tensor]) -> int:
    """The largest R of the groups."""
    return max(A.shape[-2] for A in lora_A)


def positions(x: Tensor, rows: Tensor | None) -> int:
    """M', how many rows the groups have together."""
    return x.shape[0] if rows is None else rows.shape[0]


class _Group:
    """What one group that is not empty multiplies with."""

    def __init__(self, g, start, end, lora_A, lora_B, scaling, rows, dropout_p, seed, like):
        self.g, self.span, self.scaling = g, slice(start, end), scaling
        self.A, self.B = of_group(lora_A, g).to(like.dtype), of_group(lora_B, g).to(like.dtype)
        self.rows = torch.arange(start, end, device=like.device) if rows is None else rows[start:end]
        self.mask: Tensor | None = None
        if seed is not None and dropout_p[g] > 0.0:
            size = end - start, self.A.shape[1]
            self.mask = dropout_mask(seed, *size, dropout_p[g], like.dtype, self.rows)

    def masked(self, t: Tensor) -> Tensor:
        return t if self.mask is None else t * self.mask


def _groups(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, like: Tensor) -> Iterator[_Group]:
    bounds, scalings = offsets.tolist(), scaling.tolist()
    for g, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            yield _Group(g, start, end, lora_A, lora_B, scalings[g], rows, dropout_p, seed, like)


def grouped_update(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """y [M, N] with the updates, in a tensor of its own, and h [M', R]: row m is s_g drop(x_m) A_gt in the first R_g
    columns and zero in the others, R the largest rank.

    Args:
        y, x: [M, N] and [M, K], one dtype.
        lora_A, lora_B: lists, as above, in x's dtype or fp32.
        scaling: [G], fp32 (fp64 for x in fp64), on x's device, as offsets and rows are.
        offsets: int [G + 1], ascending from 0 to M'.
        rows: int [M'], each once, or None for all rows of x in their order.
        dropout_p: G floats, or none where nothing is dropped; row i of x has row i of dropout's mask.
        seed: int64 [1], or None where nothing is dropped.
    """
    out, h = y.clone(memory_format=torch.contiguous_format), x.new_zeros(positions(x, rows), largest_rank(lora_A))
    for group in _groups(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, x):
        low = (group.masked(x[group.rows]) @ group.A.t()).mul_(group.scaling)
        h[group.span, : low.shape[1]] = low
        out[group.rows] = torch.addmm(out[group.rows], low, group.B.t())
    return out, h


def grouped_update_backward(
    dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs
) -> list[Tensor | None]:
    """[dx, *dA, *dB], None for those that `needs`, as many bools, does not ask for; a gradient has its factor's shape
    and dtype, and is zero where its group is empty. x or h is None where no needed gradient uses it."""
    need_x, need_A, need_B = needs[0], needs[1 : 1 + len(lora_A)], needs[1 + len(lora_A) :]
    dx = dy.new_zeros(dy.shape[0], lora_A[0].shape[-1]) if need_x else None
    dA, dB = (
        [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if need else None for t, need in pairs]
        for pairs in (zip(lora_A, need_A), zip(lora_B, need_B))
    )
    for group in _groups(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, dy):
        dy_g, into = dy[group.rows], group.g if lora_A[0].dim() == 2 else 0
        if need_x or need_A[into]:
            dh = (dy_g @ group.B).mul_(group.scaling)
            if dx is not None:
                dx[group.rows] = group.masked(dh @ group.A)
            _add(dA, group.g, lambda: dh.t() @ group.masked(x[group.rows]))  # noqa: B023  it is called at once
        _add(dB, group.g, lambda: dy_g.t() @ h[group.span, : group.B.shape[1]])  # noqa: B023
    grads = [dx, *dA, *dB]
    given = [dy, *lora_A, *lora_B]
    return [grad if grad is None else grad.to(t.dtype) for grad, t in zip(grads, given)]


def _add(grads: list[Tensor | None], g: int, product: Any) -> None:
    """Add a group's share to its gradient, if that is asked for."""
    stack = grads[0] if len(grads) == 1 else None
    if stack is not None and stack.dim() == 3:
        stack[min(g, stack.shape[0] - 1)] += product()
    elif (grad := grads[min(g, len(grads) - 1)]) is not None:
        grad += product()


def grouped_composition(y, x, lora_A, lora_B, scaling, offsets, rows, mask) -> Tensor:
    """`grouped_update`'s y as PyTorch's autograd differentiates it, without a look at the values of offsets: all ranks
    of all groups for every row, of which its own count. mask is dropout's [M', K], or None."""
    every = range(offsets.shape[0] - 1)
    As, Bs = [of_group(lora_A, g).to(x.dtype) for g in every], [of_group(lora_B, g).to(x.dtype) for g in every]
    flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    flat = flat if rows is None else flat.index_select(0, rows)
    group = torch.searchsorted(offsets, torch.arange(flat.shape[0], device=x.device, dtype=offsets.dtype), right=True)
    owner = torch.cat([torch.full((A.shape[0],), g + 1, device=x.device) for g, A in zip(every, As)])
    low = (flat if mask is None else flat * mask) @ torch.cat(As).t()
    low = torch.where(group[:, None] == owner, low * scaling.to(x.dtype)[group - 1, None], 0.0)
    update = low @ torch.cat(Bs, 1).t()
    return (out + update if rows is None else out.index_add(0, rows, update)).view(y.shape)
