"""Spectra, ranks and intruders of updates."""

import pytest
import torch

from fused_lora.analysis import (
    Factors,
    effective_rank,
    intruder_dimensions,
    left_vectors,
    pareto,
    perturbation_rank,
    scale_intruders,
    singular_values,
)
from fused_lora.analysis.spectra import top_singular


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direction(n, seed):
    v = gaussian(n, seed=seed)
    return v / v.norm()


@pytest.mark.parametrize("N, K, r", [(40, 24, 5), (24, 40, 1), (8, 30, 12), (30, 8, 12)])
def test_factors_have_the_spectrum_of_the_dense_update(N, K, r):
    factors = Factors(gaussian(N, r), gaussian(r, K, seed=1), -0.7)
    dense = torch.linalg.svdvals(-0.7 * factors.lora_B @ factors.lora_A)
    got, rank = singular_values(factors), min(N, K, r)
    torch.testing.assert_close(got[:rank], dense[:rank])
    assert len(got) <= r and got[rank:].sum() + dense[rank:].sum() < 1e-12 * dense[0]
    assert perturbation_rank(factors) == perturbation_rank(-0.7 * factors.lora_B @ factors.lora_A) <= r
    assert perturbation_rank(tuple(factors)[:2]) == perturbation_rank(factors), "whatever the scaling"


def test_ranks_of_known_spectra():
    def ranks(values, energy=0.9):
        return perturbation_rank(torch.diag(torch.tensor(values)), energy)

    assert ranks([3.0, 1.0, 0.0]) == 1 and ranks([2.0, 1.0, 0.5]) == 2 and ranks([1.0] * 10) == 9
    assert ranks([1.0] * 10, 1.0) == 10 and ranks([1.0, 0.0], 1.0) == 1 and ranks([0.0, 0.0]) == 0
    assert effective_rank(torch.diag(torch.ones(7))) == pytest.approx(7)
    assert effective_rank(torch.zeros(3, 3)) == 0 and effective_rank(torch.eye(4)[:1]) == pytest.approx(1)
    assert effective_rank(1e-30 * torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)
    assert 30 <= perturbation_rank(gaussian(64, 64)) <= 36
    assert perturbation_rank(gaussian(64, 64).bfloat16()) == pytest.approx(perturbation_rank(gaussian(64, 64)), abs=1)


def test_top_triples_by_products_with_vectors_are_the_dense_ones():
    cases = [gaussian(60, 90), gaussian(90, 60), gaussian(40, 3) @ gaussian(3, 50, seed=1), torch.eye(30).double()]
    cases += [torch.diag(torch.tensor([5.0, 5.0, 5.0, 1.0, 1.0, 0.5]).double()), gaussian(1, 9), gaussian(9, 1)]
    cases += [torch.diag(0.9 ** torch.arange(200).double()), torch.zeros(6, 4).double()]
    wanted = [8] * len(cases) + [16, 16]
    cases += [gaussian(16, 48, seed=1), gaussian(48, 16, seed=1)]  # all triples; seed 0 is that of the first direction
    for W, most in zip(cases, wanted, strict=True):
        U, S, V = top_singular(lambda v, W=W: W @ v, lambda u, W=W: W.T @ u, *W.shape, most, W)
        dense, k = torch.linalg.svdvals(W), min(most, *W.shape)
        torch.testing.assert_close(S, dense[:k], rtol=0, atol=1e-7 * float(dense[0]))
        torch.testing.assert_close(U.T @ U, torch.eye(k).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(V.T @ V, torch.eye(k).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(U.T @ W @ V, torch.diag(S), rtol=0, atol=1e-7 * float(dense[0]))


@pytest.fixture(params=["dense", "factors"])
def planted(request):
    """A weight and an update that brings in one large direction, far from all others."""
    W0 = torch.linalg.qr(gaussian(200, 200)).Q @ torch.diag(2 * 0.9 ** torch.arange(200).double())
    W0 = W0 @ torch.linalg.qr(gaussian(200, 200, seed=1)).Q
    U0 = left_vectors(W0)
    u, v = U0 @ torch.ones(200).double() / 200**0.5, direction(200, 3)
    factors = Factors((3 * u)[:, None], v[None], 1.0)
    return W0, factors if request.param == "factors" else W0 + 3 * torch.outer(u, v), u


def dense(W0, tuned):
    return tuned if isinstance(tuned, torch.Tensor) else W0 + tuned[2] * tuned[0] @ tuned[1]


def test_a_planted_intruder_is_found_and_removed(planted):
    W0, tuned, u = planted
    found = intruder_dimensions(W0, tuned, U0=left_vectors(W0))
    assert len(found) == 1 and found.indices.tolist() == [0] and found.similarity.shape == (10,)
    assert abs(found.U[:, 0] @ u) > 0.95
    assert len(intruder_dimensions(W0, W0)) == 0 and len(intruder_dimensions(W0, tuned, eps=0.05)) == 0
    assert len(intruder_dimensions(W0, (torch.zeros(200, 2), torch.ones(2, 200)))) == 0
    same = dense(W0, scale_intruders(W0, tuned, 1.0))
    torch.testing.assert_close(same, dense(W0, tuned), rtol=0, atol=1e-12)
    without = scale_intruders(W0, tuned, 0.0)
    assert len(intruder_dimensions(W0, dense(W0, without))) == 0
    expected = dense(W0, tuned) - found.S[0] * torch.outer(found.U[:, 0], found.V[:, 0])
    torch.testing.assert_close(dense(W0, without), expected, rtol=0, atol=1e-6)
    half = dense(W0, scale_intruders(W0, tuned, 0.5, most=1))
    torch.testing.assert_close(half, (dense(W0, tuned) + expected) / 2, rtol=0, atol=1e-6)
    assert dense(W0, scale_intruders(W0, tuned, 0.0, most=0)).equal(dense(W0, tuned))


def test_signs_and_the_order_of_rows_and_columns_do_not_matter(planted):
    W0, tuned, _ = planted
    want = intruder_dimensions(W0, tuned)
    W1, rows, columns = dense(W0, tuned), torch.randperm(200), torch.randperm(200)
    signs = torch.where(torch.rand(200) < 0.5, -1.0, 1.0).double()
    for change in (lambda W: -W, lambda W: W[rows], lambda W: W[:, columns], lambda W: W * signs[:, None]):
        got = intruder_dimensions(change(W0), change(W1))
        assert got.indices.equal(want.indices)
        torch.testing.assert_close(got.similarity, want.similarity, rtol=0, atol=1e-6)
    again = intruder_dimensions(W0, W1, U0=left_vectors(W0)[:, torch.randperm(200)] * signs)
    torch.testing.assert_close(again.similarity, want.similarity, rtol=0, atol=1e-6)


def test_pareto():
    assert pareto([1, 2, 3, 2.5], [0.1, 0.3, 0.9, 0.2]) == [0, 3, 2]
    assert pareto([], []) == [] and pareto([1, 1], [2, 2]) == [0, 1] and pareto([1, 1], [2, 1]) == [1]
    assert pareto([2, 1], [1, 1]) == [0]


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: perturbation_rank(torch.ones(3)), "delta must be a floating point matrix; got torch.float32 of shape"),
        (lambda: perturbation_rank(torch.ones(3, 3), 0), r"energy must be in \(0, 1\]; got 0"),
        (lambda: effective_rank(torch.full((2, 2), torch.inf)), "delta must be finite"),
        (lambda: singular_values((torch.ones(3, 2), torch.ones(3, 3))), "must share R"),
        (lambda: singular_values((torch.ones(3, 2),)), "factors must be"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(4)), "tuned must have W0's shape"),
        (lambda: intruder_dimensions(torch.eye(3), (torch.ones(4, 1), torch.ones(1, 3))), "factors must be of W0"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), U0=torch.eye(4)), "U0 must be left_vectors"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), k=0), "k must be an int >= 1"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), eps=2), r"eps must be in \(0, 1\]"),
        (lambda: pareto([1], []), "one number a point each; got 1 and 0"),
        (lambda: pareto([float("nan")], [1]), "got nan"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
