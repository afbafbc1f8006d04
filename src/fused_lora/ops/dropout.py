"""The LoRA dropout mask, drawn anew wherever it is needed and never stored."""

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """The 16-bit draw below which an element is dropped; p is resolved to 1.5e-5."""
    return min(round(p * 65536), 65535)


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps modulo 2**64, which keeps both halves right
    return product >> 32 & _M32, product & _M32


def dropout_mask(
    seed: Tensor, M: int, K: int, p: float, dtype: torch.dtype = torch.float32, rows: Tensor | None = None
) -> Tensor:
    """The LoRA dropout mask [M, K]: 0 where an element is dropped, 1 / (1 - p) where it is kept.

    Philox4x32-10 with key = seed and counter = (column // 8, row, 0, 0) gives eight 16-bit draws for a row's eight
    columns; an element is kept iff its draw is at least `dropout_threshold(p)`. Every back end regenerates this mask
    and none stores it.

    Args:
        seed: int64 [1], on the device where the mask is wanted.
        M, K: rows and columns.
        p: probability of dropping, in [0, 1).
        dtype: dtype of the result.
        rows: int [M], the numbers of the rows that are wanted; None is the first M.
    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    threshold = dropout_threshold(p)
    groups = torch.arange((K + 7) // 8, device=seed.device)
    rows = torch.arange(M, device=seed.device) if rows is None else rows.long()
    w0, w1 = (t.contiguous() for t in torch.broadcast_tensors(groups[None, :], rows[:, None]))
    w2, w3 = torch.zeros_like(w0), torch.zeros_like(w0)
    k0, k1 = seed & _M32, seed >> 32 & _M32
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, w0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, w2)
        w0, w1, w2, w3 = hi1 ^ w1 ^ k0, lo1, hi0 ^ w3 ^ k1, lo0
        k0, k1 = k0 + 0x9E3779B9 & _M32, k1 + 0xBB67AE85 & _M32
    words = torch.stack([w0, w1, w2, w3], dim=-1)
    draws = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :K]
    return (draws >= threshold).to(dtype) * (65536 / (65536 - threshold))
