"""The r x r matrices of pairs: spectra of Gram matrices, in fp64, for whole batches."""

from typing import NamedTuple

import torch
from torch import Tensor


class Whitening(NamedTuple):
    """X as an orthonormal basis of its columns and a small matrix: X = basis sqrt(values) vectorsT, where a column of
    the basis is zero for each rank that X lacks."""

    values: Tensor  # [P, R] eigenvalues of XT X in fp64, ascending, zero for ranks that X lacks
    vectors: Tensor  # [P, R, R] in fp64
    inverse: Tensor  # [P, R, R] in X's dtype: vectors / sqrt(values), so basis = X inverse
    basis: Tensor  # [P, n, R] in X's dtype


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [P, R], not negative, and eigenvectors [P, R, R] in fp64 of positive semidefinite matrices."""
    try:
        values, vectors = torch.linalg.eigh(matrices.double())
    except torch.linalg.LinAlgError as error:
        raise ValueError("A, B and their gradients must be finite; got others") from error
    return values.clamp(min=0), vectors


def whiten(X: Tensor, floor: float, damping: float = 0.0) -> Whitening:
    """An orthonormal basis of the columns of each X.

    The Gram matrix in fp64 tells singular values down to 1e-8 of the largest apart, where fp32 itself ends at 1e-7, and
    costs a quarter of a QR factorisation (210 of [576, 16]: 4 ms against 13, two cores of a Xeon, 2026-11-26).

    Args:
        X: [P, n, R].
        floor: eigenvalues of XT X up to this part of the largest count as zero.
        damping: this part of the mean eigenvalue is added to each that does not.
    """
    exact = X.double()
    values, vectors = eigh(exact.mT @ exact)
    kept = values > floor * values[:, -1:]
    values = torch.where(kept, values + damping * values.mean(-1, keepdim=True), 0.0)
    inverse = vectors * reciprocal(values.sqrt())[:, None, :]
    return Whitening(values, vectors, inverse.to(X.dtype), (exact @ inverse).to(X.dtype))


def reciprocal(values: Tensor) -> Tensor:
    """1 / values, zero for zero."""
    return torch.where(values > 0, 1 / values, 0.0)
