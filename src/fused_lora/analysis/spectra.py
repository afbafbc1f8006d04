"""Singular values of an update, dense or as factors, and the ranks that they say."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """An update scaling * lora_B lora_A that is never multiplied out. A plain tuple of these serves as well."""

    lora_B: Tensor  # [N, R]
    lora_A: Tensor  # [R, K]
    scaling: float = 1.0


Delta = Tensor | tuple


def as_matrix(name: str, t: Tensor) -> Tensor:
    """A finite matrix in fp32 at least. Raises: ValueError naming it."""
    if not isinstance(t, Tensor) or t.dim() != 2 or not t.is_floating_point():
        got = f"{t.dtype} of shape {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name} must be a floating point matrix; got {got}")
    if not torch.isfinite(t).all():
        raise ValueError(f"{name} must be finite; got elements that are not")
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def as_factors(delta: tuple) -> Factors:
    """Factors in fp64, their shapes checked. Raises: ValueError."""
    if len(delta) not in (2, 3):
        raise ValueError(f"factors must be (lora_B, lora_A) or (lora_B, lora_A, scaling); got {len(delta)} entries")
    factors = Factors(*delta)
    lora_B, lora_A = as_matrix("lora_B", factors.lora_B), as_matrix("lora_A", factors.lora_A)
    if lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(
            f"lora_B [N, R] and lora_A [R, K] must share R; got {list(lora_B.shape)} and {list(lora_A.shape)}"
        )
    return Factors(lora_B.double(), lora_A.double(), float(factors.scaling))


def singular_values(delta: Delta) -> Tensor:
    """The singular values of an update, largest first.

    Equivalent to ``torch.linalg.svdvals(delta)``; of factors to the largest R of
    ``torch.linalg.svdvals(scaling * lora_B @ lora_A)``, by QR of lora_B and of lora_A's transpose and an SVD [R, R].

    Args:
        delta: a matrix [N, K], or `Factors`.
    Returns: [min(N, K)] in fp32 or fp64; of factors at most [R] in fp64.
    Raises: ValueError for anything that is no finite matrix, or factors that do not fit.
    """
    if isinstance(delta, Tensor):
        return torch.linalg.svdvals(as_matrix("delta", delta))
    lora_B, lora_A, scaling = as_factors(delta)
    small = torch.linalg.qr(lora_B).R @ torch.linalg.qr(lora_A.T).R.T
    return torch.linalg.svdvals(small) * abs(scaling)


def perturbation_rank(delta: Delta, energy: float = 0.9) -> int:
    """The least k for which the k largest singular values hold a share of the update's energy.

    Equivalent to the least k with ``(s[:k] ** 2).sum() >= energy * (s ** 2).sum()``; 0 for an update that is zero.

    Args: delta: as in `singular_values`; energy: in (0, 1].
    Raises: ValueError as `singular_values`, and for an energy out of range.
    Source: Biderman et al., arXiv 2405.09673.
    """
    return energy_rank_of(singular_values(delta), energy)


def energy_rank_of(values: Tensor, energy: float) -> int:
    """`perturbation_rank` of singular values, largest first."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1]; got {energy}")
    shares = _shares(values, 2)
    return int((shares.cumsum(0) < energy * (1 - 1e-12)).sum()) + 1 if len(shares) else 0


def effective_rank(delta: Delta) -> float:
    """exp of the entropy of the singular values as a distribution: n for n equal ones, 0 for an update that is zero.

    Args, Raises: as in `singular_values`.
    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007; used in arXiv 2410.21228.
    """
    return effective_rank_of(singular_values(delta))


def effective_rank_of(values: Tensor) -> float:
    """`effective_rank` of singular values."""
    shares = _shares(values, 1)
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def _shares(values: Tensor, power: int) -> Tensor:
    """Each value's share in the sum of powers, in fp64; none where all are zero."""
    largest = values.max() if len(values) else values.sum()
    if not largest:
        return values[:0].double()
    powers = (values.double() / largest.double()) ** power
    return powers / powers.sum()


def top_singular(
    product: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], N: int, K: int, k: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triples of a matrix [N, K] that is only ever multiplied with vectors.

    Lanczos bidiagonalisation in fp64 with full reorthogonalisation, which goes on until each triple's residual is below
    1e-8 of the largest singular value, or the whole space is spanned.

    Args:
        product, transposed: v [K] to W v [N], and u [N] to Wt u [K].
        like: a tensor on the device.
    Returns: U [N, k], S [k], V [K, k] in fp64.
    """
    generator = torch.Generator().manual_seed(0)
    n, k = min(N, K), min(k, N, K)
    right, left = (torch.zeros(n + 1, size, dtype=torch.float64, device=like.device) for size in (K, N))
    band = torch.zeros(n, n + 1, dtype=torch.float64, device=like.device)  # U^T W V: a diagonal and one above it

    def fresh(basis: Tensor) -> Tensor:
        v = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64).to(basis.device)
        return _orthogonal(v, basis) / _orthogonal(v, basis).norm()

    right[0] = fresh(right[:0])
    for m in range(1, n + 1):
        u = _orthogonal(product(right[m - 1]) - (band[m - 2, m - 1] * left[m - 2] if m > 1 else 0), left[: m - 1])
        band[m - 1, m - 1], left[m - 1] = _split(u, band, partial(fresh, left[: m - 1]))
        v = _orthogonal(transposed(left[m - 1]) - band[m - 1, m - 1] * right[m - 1], right[:m])
        if m < K:
            band[m - 1, m], right[m] = _split(v, band, partial(fresh, right[:m]))
        if m == n or (m >= 2 * k + 10 and m % 10 == 0):
            width = m + (m == n < K)  # u spans all then, and W^T u_n has a last part beside the v so far
            P, S, Qh = torch.linalg.svd(band[:m, :width], full_matrices=False)
            residual = (band[m - 1, m] * P[m - 1, :k]).abs().max()
            if m == n or residual <= 1e-8 * S[0]:
                break
    return left[:m].T @ P[:, :k], S[:k], right[:width].T @ Qh[:k].T


def _orthogonal(v: Tensor, basis: Tensor) -> Tensor:
    """v less its part in the rows of a basis, taken off twice for rounding's sake."""
    for _ in range(2):
        v = v - basis.T @ (basis @ v)
    return v


def _split(v: Tensor, band: Tensor, fresh: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Length and direction of a vector; where nothing is left of it, 0 and a fresh direction."""
    length = v.norm()
    if length <= 1e-13 * band.abs().max():
        return torch.zeros_like(length), fresh()
    return length, v / length
