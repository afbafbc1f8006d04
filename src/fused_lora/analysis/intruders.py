"""Intruder dimensions: large singular directions of a tuned weight that the weight before did not have."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.analysis.spectra import Factors, as_factors, as_matrix, top_singular


class Intruders(NamedTuple):
    """The top singular triples of a tuned weight, and which of them are intruders."""

    indices: Tensor  # of the intruders among the triples, largest first
    similarity: Tensor  # [k], of each left vector to the nearest one of the weight before
    U: Tensor  # [N, k]
    S: Tensor  # [k]
    V: Tensor  # [K, k]

    def __len__(self) -> int:
        return len(self.indices)


def left_vectors(W0: Tensor) -> Tensor:
    """All left singular vectors [N, min(N, K)] of a weight [N, K] in fp64: what `intruder_dimensions` compares with,
    to be computed once where several updates of one weight are looked at."""
    return torch.linalg.svd(as_matrix("W0", W0).double(), full_matrices=False).U


def intruder_dimensions(
    W0: Tensor, tuned: Tensor | tuple, k: int = 10, eps: float = 0.5, U0: Tensor | None = None
) -> Intruders:
    """The intruders among a tuned weight's k largest singular directions: those whose left vector has a cosine below
    eps, in absolute value, with every left singular vector of the weight before.

    Equivalent to, with W1 the tuned weight::

        U, S, Vh = torch.linalg.svd(W1)
        similarity = (U[:, :k].T @ torch.linalg.svd(W0).U).abs().amax(1)
        indices = (similarity < eps).nonzero()

    Args:
        W0: the weight before [N, K].
        tuned: the tuned weight [N, K], or the update of W0 as `Factors`: W0 + scaling * lora_B lora_A is then never
            formed, its top triples come from products with vectors.
        k, eps: as in the paper's 10 and 0.5.
        U0: `left_vectors(W0)`, where that is known.
    Returns: `Intruders`, in fp64. An update that is zero has none.
    Raises: ValueError naming the argument.
    Source: Shuttleworth et al., arXiv 2410.21228, algorithm 1.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an int >= 1; got {k!r}")
    if not 0 < eps <= 1:
        raise ValueError(f"eps must be in (0, 1]; got {eps}")
    before = as_matrix("W0", W0).double()
    U0 = left_vectors(before) if U0 is None else U0.double()
    if U0.shape != (before.shape[0], min(before.shape)):
        raise ValueError(f"U0 must be left_vectors(W0), {[len(before), min(before.shape)]}; got {list(U0.shape)}")
    U, S, V = _top(before, tuned, k)
    similarity = (U.T @ U0).abs().amax(1)
    return Intruders((similarity < eps).nonzero().flatten(), similarity, U, S, V)


def _top(before: Tensor, tuned: Tensor | tuple, k: int) -> tuple[Tensor, Tensor, Tensor]:
    N, K = before.shape
    if isinstance(tuned, Tensor):
        matrix = as_matrix("tuned", tuned).double()
        if matrix.shape != before.shape:
            raise ValueError(f"tuned must have W0's shape {[N, K]}; got {list(matrix.shape)}")
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k].T
    lora_B, lora_A, scaling = as_factors(tuned)
    if (len(lora_B), lora_A.shape[1]) != (N, K):
        raise ValueError(f"factors must be of W0's shape {[N, K]}; got {[len(lora_B), lora_A.shape[1]]}")
    return top_singular(
        lambda v: before @ v + scaling * (lora_B @ (lora_A @ v)),
        lambda u: before.T @ u + scaling * (lora_A.T @ (lora_B.T @ u)),
        N,
        K,
        k,
        before,
    )


def scale_intruders(
    W0: Tensor,
    tuned: Tensor | tuple,
    lam: float,
    k: int = 10,
    eps: float = 0.5,
    U0: Tensor | None = None,
    most: int | None = None,
) -> Tensor | Factors:
    """The tuned weight with its intruders scaled by lam: 1 changes nothing, 0 removes them.

    Equivalent to ``W1 + (lam - 1) * sum(S[i] * outer(U[:, i], V[:, i]) for i in intruders)``.

    Args:
        W0, tuned, k, eps, U0: as in `intruder_dimensions`.
        lam: the factor.
        most: how many intruders, the largest first; None takes all, 1 is what the paper does.
    Returns: the weight in `tuned`'s dtype; for factors the update as `Factors` of scaling 1 and rank R plus the number
        of intruders, which is exact, in lora_B's dtype.
    Raises: ValueError as `intruder_dimensions`.
    Source: Shuttleworth et al., arXiv 2410.21228, figure 8; PEFT's reduce_intruder_dimension rounds to rank R.
    """
    found = intruder_dimensions(W0, tuned, k, eps, U0)
    chosen = found.indices[:most]
    left, right = (lam - 1) * found.U[:, chosen] * found.S[chosen], found.V[:, chosen].T
    if isinstance(tuned, Tensor):
        return (tuned.detach().double() + left @ right).to(tuned.dtype) if len(chosen) and lam != 1 else tuned.detach()
    lora_B, lora_A, scaling = as_factors(tuned)
    dtype = Factors(*tuned).lora_B.dtype
    return Factors(torch.cat([scaling * lora_B, left], 1).to(dtype), torch.cat([lora_A, right]).to(dtype))
