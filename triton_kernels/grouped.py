"""What the kernels over groups of rows share: where a program's rows lie, and which factors they meet.

Positions 0 .. P - 1 are cut into G groups by offsets [G + 1]; a position's row of x, y and their gradients is
rows[position], or the position itself. A tile never straddles groups, and nothing is read on the host: with tiles of T
positions, group g owns the work items from offsets[g] // T + g up to those of group g + 1. That is at least as many as
its tiles, at least one for an empty group, and P // T + G items in all; an item past its group's tiles ends at once.
Factors are one stack, whose stride over the groups is 0 where all share it, or a matrix for each group by a table of
addresses; groups of smaller rank than the largest have it in a table, too, and do the work of their own rank.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Groups(NamedTuple):
    """Which rows belong together."""

    offsets: Tensor | None  # int [G + 1]; None: all positions are one group
    rows: Tensor | None  # int [P], or None
    ranks: Tensor | None  # int32 [G], in multiples of unit, or None where all are R
    unit: int  # 8 where it divides all ranks, so that the compiler sees that whole vectors are loaded; else 1
    G: int
    P: int
    R: int  # the largest rank

    def items(self, tile: int) -> int:
        """How many work items there are for tiles of so many positions."""
        return self.P // tile + self.G

    @property
    def constexprs(self) -> dict[str, int]:
        """What every kernel over groups takes."""
        return {"R": self.R, "UNIT": self.unit, "BLOCK_G": triton.next_power_of_2(self.G)}


class Factors(NamedTuple):
    """The thin matrices of all groups, as kernels take them: of group g at first + g * stride_g, or at table[g]."""

    first: Tensor  # the stack, or a matrix of the dtype
    table: Tensor | None  # int64 [G], addresses
    stride_g: int
    stride_rank: int  # between ranks
    stride_wide: int | None  # along K or N; None: the group's own rank
    aligned: bool  # whether all addresses are multiples of 16 bytes
    held: Sequence[Tensor]  # what the addresses are of


def stack_or_table(tensors: Sequence[Tensor], *, ranks_first: bool) -> Factors:
    """One stack [G or 1, R, K] (ranks_first) or [G or 1, N, R], or G matrices [R_g, K] or [N, R_g]."""
    first = tensors[0]
    if first.dim() == 3:
        stride_g, *strides = first.stride()
        stride_rank, stride_wide = strides if ranks_first else strides[::-1]
        return Factors(first, None, 0 if first.shape[0] == 1 else stride_g, stride_rank, stride_wide, True, tensors)
    held = [t.contiguous() for t in tensors]
    strides = (first.shape[1], 1) if ranks_first else (1, None)
    addresses = tuple(t.data_ptr() for t in held)
    aligned = all(address % 16 == 0 for address in addresses)
    return Factors(held[0], on_device(addresses, torch.int64, first.device), 0, *strides, aligned, held)


@functools.lru_cache(1024)
def on_device(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host, copied once: ranks, and addresses, which parameters keep from step to step."""
    return torch.tensor(values, dtype=dtype, device=device)


@triton.jit
def item_of(offsets, item, P, G, TILE: tl.constexpr, BLOCK_G: tl.constexpr):
    """A work item's group, its group's first position and end, and its own first position, past the end if it has no
    tile."""
    if offsets is None:
        g, start, end, first = item * 0, item * 0, P, item * TILE
    else:
        offs_g = tl.arange(0, BLOCK_G)
        starts = tl.load(offsets + offs_g, mask=offs_g < G, other=0).to(tl.int32)
        g = tl.sum(((starts // TILE + offs_g <= item) & (offs_g < G)).to(tl.int32), 0) - 1
        start, end = tl.load(offsets + g).to(tl.int32), tl.load(offsets + g + 1).to(tl.int32)
        first = start + (item - start // TILE - g) * TILE
    return g, start, end, first


@triton.jit
def rank_of(ranks, g, R: tl.constexpr, UNIT: tl.constexpr):
    """The rank of a group."""
    if ranks is None:
        rank = R
    else:
        rank = tl.load(ranks + g) * UNIT
    return rank


@triton.jit
def rows_at(rows, positions, mask):
    """The rows of positions, int64 [BLOCK]."""
    if rows is None:
        at = positions.to(tl.int64)
    else:
        at = tl.load(rows + positions, mask=mask, other=0).to(tl.int64)
    return at


@triton.jit
def factor_at(first, table, g, stride_g, ALIGNED: tl.constexpr):
    """Where the matrix of a group begins."""
    if table is None:
        at = first + g.to(tl.int64) * stride_g
    else:
        at = tl.load(table + g).to(first.dtype)
        if ALIGNED:
            at = tl.multiple_of(at, 16)
    return at
