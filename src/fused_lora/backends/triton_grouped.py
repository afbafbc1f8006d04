"""`grouped_lora_update` of the Triton back end.

    forward    grouped_shrink (h), grouped_expand (y)
    backward   grouped_shrink (dh); grouped_expand (dx); grouped_wgrad (dA, dB), with a launch that sums fp32 slabs
               where a group may have more rows than a work item

Nothing is read on the host: neither offsets nor rows. The gradients of matrices are parts of one allocation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.grouped_reference import positions
from fused_lora.triton_kernels.configs import grouped_expand_config, grouped_shrink_config, grouped_wgrad_config
from fused_lora.triton_kernels.device import current, facts, row_major
from fused_lora.triton_kernels.grouped import Groups, on_device, stack_or_table
from fused_lora.triton_kernels.grouped_expand import grouped_expand
from fused_lora.triton_kernels.grouped_shrink import grouped_shrink
from fused_lora.triton_kernels.grouped_wgrad import grouped_wgrad


class _Dropout(NamedTuple):
    """The groups' dropout, as kernels take it; all None where nothing is dropped."""

    seed: Tensor | None = None  # int64 [1]
    thresholds: Tensor | None = None  # int32 [G]
    factors: Tensor | None = None  # fp32 [G], what the elements that stay are multiplied by

    def drawn(self) -> dict[str, Tensor | None]:
        return {"seed": self.seed, "thresholds": self.thresholds}


def _dropout(dropout_p: Sequence[float], seed: Tensor | None) -> _Dropout:
    if seed is None:
        return _Dropout()
    thresholds = tuple(map(dropout_threshold, dropout_p))
    factors = tuple(65536 / (65536 - threshold) for threshold in thresholds)
    on = seed.device
    return _Dropout(seed, on_device(thresholds, torch.int32, on), on_device(factors, torch.float32, on))


def _groups(like: Tensor, lora_A: Sequence[Tensor], offsets: Tensor, rows: Tensor | None) -> Groups:
    """The groups of a call, from x or dy and the others."""
    ranks, G = [A.shape[-2] for A in lora_A], offsets.shape[0] - 1
    rows, mixed, unit = None if rows is None else rows.contiguous(), None, 1
    if len(set(ranks)) > 1:
        unit = 8 if all(rank % 8 == 0 for rank in ranks) else 1
        mixed = on_device(tuple(rank // unit for rank in ranks), torch.int32, offsets.device)
    return Groups(offsets.contiguous(), rows, mixed, unit, G, positions(like, rows), max(ranks))


def grouped_update(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed):
    """y [M, N] with the updates, in a tensor of its own, and h [P, R]; see `grouped_reference.grouped_update`."""
    x, groups, dropout = row_major(x), _groups(x, lora_A, offsets, rows), _dropout(dropout_p, seed)
    (M, K), N, P, itemsize = x.shape, y.shape[1], groups.P, x.element_size()
    A, B = stack_or_table(lora_A, ranks_first=True), stack_or_table(lora_B, ranks_first=False)
    if rows is None:  # every row is written
        base, out = row_major(y), torch.empty((M, N), dtype=y.dtype, device=y.device)
    else:
        base = out = y.clone(memory_format=torch.contiguous_format)
    with current(x.device):
        c = grouped_shrink_config(P, groups.G, K, groups.R, itemsize, facts(x.device))
        factors = scaling.contiguous() if dropout.factors is None else scaling * dropout.factors
        h = grouped_shrink(x, A, groups, factors, c, **dropout.drawn())
        return grouped_expand(h, B, base, out, groups, grouped_expand_config(P, groups.G, N, groups.R, itemsize)), h


def grouped_update_backward(dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs):
    """[dx, *dA, *dB], None for those that `needs` does not ask for; see `grouped_reference.grouped_update_backward`."""
    dy, groups, dropout = row_major(dy), _groups(dy, lora_A, offsets, rows), _dropout(dropout_p, seed)
    need_x, need_A, need_B = needs[0], needs[1 : 1 + len(lora_A)], needs[1 + len(lora_A) :]
    (M, N), K, P, itemsize = dy.shape, lora_A[0].shape[-1], groups.P, dy.element_size()
    dx, dA, dB = None, [None] * len(lora_A), [None] * len(lora_B)
    with current(dy.device):
        if need_x or any(need_A):
            c = grouped_shrink_config(P, groups.G, N, groups.R, itemsize, facts(dy.device))
            dh = grouped_shrink(dy, stack_or_table(lora_B, ranks_first=False), groups, scaling.contiguous(), c)
        if need_x:
            make = torch.empty if rows is None else torch.zeros  # rows without a group get zeros
            dx = make((M, K), dtype=dy.dtype, device=dy.device)
            A, c = stack_or_table(lora_A, ranks_first=True), grouped_expand_config(P, groups.G, K, groups.R, itemsize)
            grouped_expand(dh, A, None, dx, groups, c, **dropout.drawn(), keep_factors=dropout.factors)
        if any(need_A):
            dA = _thin_gradients(dh, row_major(x), lora_A, need_A, groups, dropout, False)
        if any(need_B):
            dB = _thin_gradients(h.contiguous(), dy, lora_B, need_B, groups, _Dropout(), True)
    return [dx, *dA, *dB]


def _thin_gradients(low, left, factors, need, groups: Groups, dropout: _Dropout, transposed: bool) -> list[Any]:
    """The gradients of the factors A, or of B if transposed, None for those that are not needed."""
    first, dtype, device = factors[0], factors[0].dtype, left.device
    c = grouped_wgrad_config(groups.P, left.shape[1], groups.R, left.element_size(), facts(device))

    def into(out: Tensor, starts: Tensor | None, groups: Groups) -> None:
        drawn = {**dropout.drawn(), "factors": dropout.factors}
        grouped_wgrad(low, left, out, starts, groups, c, transposed=transposed, **drawn)

    if first.dim() == 3 and first.shape[0] == 1 and groups.G > 1:  # shared: the sum of all
        if dropout.seed is None:
            out = torch.empty(first.shape, dtype=dtype, device=device)
            into(out, None, groups._replace(offsets=None, G=1))
            return [out]
        each = torch.empty((groups.G, *first.shape[1:]), dtype=torch.float32, device=device)
        into(each, None, groups)
        return [each.sum(0, keepdim=True).to(dtype)]
    if first.dim() == 3:
        out = torch.empty(first.shape, dtype=dtype, device=device)
        into(out, None, groups)
        return [out]
    sizes = [t.numel() for t in factors]
    out = torch.empty(sum(sizes), dtype=dtype, device=device)
    starts = on_device(tuple(sum(sizes[:g]) for g in range(len(sizes))), torch.int64, device)
    into(out, starts, groups)
    parts = zip(out.split(sizes), factors, need)
    return [part.view(t.shape) if needed else None for part, t, needed in parts]
