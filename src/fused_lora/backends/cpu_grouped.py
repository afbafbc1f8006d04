"""The CPU back end of `grouped_lora_update`: csrc/cpu/grouped.cpp, told of the factors by tables of their addresses."""

from array import array

import torch
from torch import Tensor

from fused_lora import _C
from fused_lora.ops.dropout import dropout_threshold
from fused_lora.ops.grouped_reference import largest_rank, positions
from fused_lora.ops.internals import empty_on_cpu

_CODE = {getattr(torch, name): code for name, code in _C.dtype_codes.items()}


def grouped_update(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed):
    """y [M, N] with the updates in a tensor of its own, and h [M', R]; see `grouped_reference.grouped_update`."""
    y = y.clone(memory_format=torch.contiguous_format)
    return y, grouped_update_onto(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed)


def grouped_update_onto(y, x, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed):
    """h of `grouped_update`; the updates are added to y [M, N], contiguous, where it lies."""
    (x, ldx), size = _rows(x), (positions(x, rows), largest_rank(lora_A))
    h = empty_on_cpu(size, (size[1], 1), x.dtype)
    call = _Call(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, x.dtype)
    _C.cpu_grouped_forward(x=(x.data_ptr(), ldx), h=h.data_ptr(), y=y.data_ptr(), **call.keywords)
    return h


def grouped_update_backward(
    dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs
) -> list[Tensor | None]:
    """The gradients that `needs` asks for; see `grouped_reference.grouped_update_backward`."""
    dx = dy.new_zeros((dy.shape[0], lora_A[0].shape[-1])) if needs[0] else None
    given = dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed
    return grouped_backward_onto(dx, *given, needs)


def grouped_backward_onto(
    dx, dy, x, lora_A, lora_B, h, scaling, offsets, rows, dropout_p, seed, needs
) -> list[Tensor | None]:
    """The same with dx [M, K], contiguous, or None, added to what is there."""
    need_A, need_B = needs[1 : 1 + len(lora_A)], needs[1 + len(lora_A) :]
    dA, dB = _empty(lora_A, need_A), _empty(lora_B, need_B)
    dy, lddy = _rows(dy)
    x, ldx = (x, 0) if x is None else _rows(x)
    h = h if h is None else h.contiguous()
    call = _Call(lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, dy.dtype)
    G = call.keywords["sizes"][0]
    into_A, into_B = _table(dA, G), _table(dB, G)
    _C.cpu_grouped_backward(
        dy=(dy.data_ptr(), lddy),
        x=(0 if x is None else x.data_ptr(), ldx),
        h=0 if h is None else h.data_ptr(),
        dx=0 if dx is None else dx.data_ptr(),
        dA=(_address(into_A) if any(need_A) else 0, _shared(lora_A, G)),
        dB=(_address(into_B) if any(need_B) else 0, _shared(lora_B, G)),
        **call.keywords,
    )
    return [dx, *dA, *dB]


class _Call:
    """What forward and backward are told alike: `keywords`, with the memory that they point to."""

    def __init__(self, lora_A, lora_B, scaling, offsets, rows, dropout_p, seed, dtype):
        G = offsets.shape[0] - 1
        lora_A, lora_B = [A.contiguous() for A in lora_A], [B.contiguous() for B in lora_B]
        ranks = array("q", [A.shape[0] for A in lora_A] if lora_A[0].dim() == 2 else [lora_A[0].shape[1]] * G)
        tables = _table(lora_A, G), _table(lora_B, G), ranks
        offsets, rows = offsets.long().contiguous(), rows if rows is None else rows.long().contiguous()
        scaling, thresholds = scaling.contiguous(), array("q", map(dropout_threshold, dropout_p))
        self.keeps = lora_A, lora_B, tables, offsets, rows, scaling, thresholds, seed
        self.keywords = dict(
            factors=tuple(map(_address, tables)),
            segments=(offsets.data_ptr(), 0 if rows is None else rows.data_ptr()),
            scaling=scaling.data_ptr(),
            sizes=(G, lora_B[0].shape[-2], lora_A[0].shape[-1], max(ranks)),
            dtypes=(_CODE[dtype], _CODE[lora_A[0].dtype]),
            dropout=(0, 0) if seed is None else (seed.data_ptr(), _address(thresholds)),
            threads=torch.get_num_threads(),
        )


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """t with neighbouring columns adjacent in memory, and its row stride."""
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


def _address(table: array) -> int:
    return table.buffer_info()[0]


def _table(factors: list[Tensor | None], G: int) -> array:
    """The address of each group's matrix in a list of contiguous factors, 0 for none; where groups share one, that."""
    first = factors[0]
    if first is None or first.dim() == 2:
        return array("q", [0 if t is None else t.data_ptr() for t in factors])
    step = 0 if first.shape[0] == 1 else first.stride(0) * first.element_size()
    return array("q", [first.data_ptr() + g * step for g in range(G)])


def _shared(factors: list[Tensor], G: int) -> int:
    """Whether the groups share one matrix."""
    return int(factors[0].dim() == 3 and factors[0].shape[0] == 1 and G > 1)


def _empty(factors: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [_empty_like(t) if need else None for t, need in zip(factors, needs)]


def _empty_like(t: Tensor) -> Tensor:
    """A contiguous tensor of t's shape and dtype."""
    if not t.is_contiguous():
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    return empty_on_cpu(tuple(t.shape), t.stride(), t.dtype)
