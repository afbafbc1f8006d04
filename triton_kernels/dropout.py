"""The LoRA dropout mask, drawn inside the kernels that need it and never stored.

    keep[m, c] = draw(seed, m, c) >= threshold

Used by: shrink (h), lora_gemm (dx), wgrad (dA). One Philox4x32-10 call with key = seed and counter = (c // 8, m, 0, 0)
gives four words, eight 16-bit draws, for eight neighbouring columns: every kernel, tile shape and back end draws the
same mask (csrc/philox.h).
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Dropout(NamedTuple):
    """A call's dropout, as kernels take it; the twin of Dropout in csrc/lora.h."""

    seed: Tensor | None  # int64 [1], read where the kernel runs; None: nothing is dropped
    threshold: int  # an element whose 16-bit draw is below is dropped; at most 65535

    @property
    def factor(self) -> float:
        """What the elements that stay are multiplied by."""
        return 65536 / (65536 - self.threshold)


NO_DROPOUT = Dropout(None, 0)


@triton.jit
def keep_tile(seed, row, col, threshold, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """Which elements of the tile at (row, col) stay: bool [BLOCK_ROW, BLOCK_COL]; col and BLOCK_COL are multiples of
    8."""
    return keep_rows(seed, row + tl.arange(0, BLOCK_ROW), col, threshold, BLOCK_ROW, BLOCK_COL)


@triton.jit
def keep_rows(seed, rows, col, threshold, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """`keep_tile` of the given rows, int32 [BLOCK_ROW]."""
    rows = rows[:, None] + tl.zeros((1, BLOCK_COL // 8), tl.int32)
    groups = (col // 8 + tl.arange(0, BLOCK_COL // 8))[None, :] + tl.zeros((BLOCK_ROW, 1), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, groups, rows, tl.zeros_like(rows), tl.zeros_like(rows))
    # Column 8 g + 4 i + 2 j + k reads half k of word 2 i + j. The slowest index is joined first: [.., i], [.., i, j],
    # [.., i, j, k].
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    draws = tl.reshape(tl.join(low, high), (BLOCK_ROW, BLOCK_COL))
    return draws.to(tl.int32) >= threshold
