"""The CPU back end of `grouped_lora_update`: csrc/cpu/grouped.cpp, told of the factors by tables of their addresses."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.grouped_reference import positions
from fused_lora.ops.internals import empty_on_cpu

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}


class Layout:
    """What the factors of G groups are, but for their values and addresses: who calls again with factors of the same
    shapes, strides and dtypes may keep it."""

    def __init__(self, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], G: int):
        first = lora_A[0]
        self.ranks = array("q", [A.shape[0] for A in lora_A] if first.dim() == 2 else [first.shape[1]] * G)
        self.R, self.dtype = max(self.ranks), first.dtype
        self.sizes = G, lora_B[0].shape[-2], first.shape[-1], self.R
        self.contiguous = all(t.is_contiguous() for t in (*lora_A, *lora_B))
        self.shared_A, self.shared_B = _shared(lora_A, G), _shared(lora_B, G)
        self.like_A, self.like_B = [_contiguous_like(A) for A in lora_A], [_contiguous_like(B) for B in lora_B]


def grouped_update(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed):
    """y [M, N] with the updates in a tensor of its own, and h [M', R]; see `grouped_reference.grouped_update`."""
    y = y.clone(memory_format=torch.contiguous_format)
    layout = Layout(lora_A, lora_B, offsets.shape[0] - 1)
    return y, grouped_update_onto(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, layout)


def grouped_update_onto(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, layout: Layout):
    """h of `grouped_update`; the updates are added to y [M, N], contiguous, where it lies."""
    h = empty_on_cpu((positions(x, rows), layout.R), (layout.R, 1), x.dtype)
    keywords, _kept = _call(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, layout)
    _C.cpu_grouped_forward(x=x, h=h, y=y, **keywords)
    return h


def grouped_update_backward(
    dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs
) -> list[Tensor | None]:
    """The gradients that `needs` asks for; see `grouped_reference.grouped_update_backward`."""
    dx = dy.new_zeros((dy.shape[0], lora_A[0].shape[-1])) if needs[0] else None
    given = dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed
    return grouped_backward_onto(dx, *given, needs, Layout(lora_A, lora_B, offsets.shape[0] - 1))


def grouped_backward_onto(
    dx, dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs, layout: Layout
) -> list[Tensor | None]:
    """The same with dx [M, K], contiguous, or None, added to what is there."""
    split, G = 1 + len(lora_A), layout.sizes[0]
    dA, dB = _empty(layout.like_A, needs[1:split]), _empty(layout.like_B, needs[split:])
    keywords, _kept = _call(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, layout)
    into_A, into_B = _table(dA, G), _table(dB, G)
    _C.cpu_grouped_backward(
        dy=dy,
        x=x,
        h=h,
        dx=dx,
        dA=(_address(into_A) if any(needs[1:split]) else 0, layout.shared_A),
        dB=(_address(into_B) if any(needs[split:]) else 0, layout.shared_B),
        **keywords,
    )
    return [dx, *dA, *dB]


def _call(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, layout: Layout) -> tuple[dict[str, Any], Any]:
    """What forward and backward are told alike, and what has the memory that it points to."""
    G = layout.sizes[0]
    if not layout.contiguous:
        lora_A, lora_B = [A.contiguous() for A in lora_A], [B.contiguous() for B in lora_B]
    table_A, table_B = _table(lora_A, G), _table(lora_B, G)
    offsets, rows = _int64(offsets), rows if rows is None else _int64(rows)
    thresholds = None if seed is None else array("q", map(dropout_threshold, dropout_p))
    keywords: dict[str, Any] = dict(
        factors=(_address(table_A), _address(table_B), _address(layout.ranks)),
        segments=(offsets.data_ptr(), 0 if rows is None else rows.data_ptr()),
        scaling=scaling,
        sizes=layout.sizes,
        adapter_dtype=_CODE[layout.dtype],
        dropout=(0, 0) if thresholds is None else (seed.data_ptr(), _address(thresholds)),
        threads=torch.get_num_threads(),
    )
    return keywords, (lora_A, lora_B, table_A, table_B, offsets, rows, thresholds)


def _int64(numbers: Tensor) -> Tensor:
    return (numbers if numbers.dtype is torch.int64 else numbers.long()).contiguous()


def _address(table: array) -> int:
    return table.buffer_info()[0]


def _table(factors: Sequence[Tensor | None], G: int) -> array:
    """The address of each group's matrix in a list of contiguous factors, 0 for none; where groups share one, that."""
    first = factors[0]
    if first is None or first.dim() == 2:
        return array("q", [0 if t is None else t.data_ptr() for t in factors])
    step = 0 if first.shape[0] == 1 else first.stride(0) * first.element_size()
    return array("q", [first.data_ptr() + g * step for g in range(G)])


def _shared(factors: Sequence[Tensor], G: int) -> int:
    """Whether the groups share one matrix."""
    return int(factors[0].dim() == 3 and factors[0].shape[0] == 1 and G > 1)


_Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _contiguous_like(t: Tensor) -> _Like:
    """What `empty_on_cpu` makes a contiguous tensor like t of."""
    if not t.is_contiguous():
        t = torch.empty(t.shape, dtype=t.dtype, device="meta")
    return tuple(t.shape), t.stride(), t.dtype


def _empty(like: Iterable[_Like], needs: Sequence[bool]) -> list[Tensor | None]:
    return [empty_on_cpu(*what) if need else None for what, need in zip(like, needs)]
