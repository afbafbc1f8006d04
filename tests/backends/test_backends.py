"""Every back end against the fp64 truth: exact integers, computed tolerances, tails, strides, pruning, dropout,
determinism."""

import itertools

import pytest
import torch
from infinities import check_infinity

from fused_lora import lora_linear
from fused_lora.ops.dropout import dropout_mask
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth

# One odd size in each place, both sides of a 16/32/64/128 tile, ranks below, at and above the padding of 8 and 16.
SHAPES = [(0, 8, 8, 4), (1, 33, 65, 1), (17, 31, 241, 12), (128, 64, 96, 16), (129, 257, 130, 8)]
LARGE_RANKS = [(33, 70, 90, 64), (17, 40, 72, 256)]


def cases(backend):
    """(dtype, adapter dtype) pairs: the same, and fp32 adapters over a half-precision base."""
    return [(d, d) for d in backend.dtypes] + [(d, torch.float32) for d in backend.dtypes if d != torch.float32]


def sizes(backend, shapes):
    """The shapes that this back end takes: TMA wants rows of 16 bytes, so the CUDA kernels need N and K in eights."""
    return [(M, -(-N // 8) * 8, -(-K // 8) * 8, R) for M, N, K, R in shapes] if backend.name == "cuda" else shapes


def seed_for(backend, value=1234567890123):
    return torch.tensor([value], dtype=torch.int64, device=backend.device)


@pytest.mark.parametrize("bias", [True, False])
def test_exact_integers(backend, poison, bias):
    """Sums of small integers are exact in every dtype: one wrong index, mask or tail breaks equality."""
    for shape, (dtype, adapter) in itertools.product(sizes(backend, SHAPES + LARGE_RANKS), cases(backend)):
        p = exact_problem(*shape, dtype, adapter, bias=bias, device=backend.device)
        assert_exact(run(p, backend=backend.name), truth(p))


def test_an_infinity_meets_no_padding(backend, poison):
    """Fewer ranks than any tile has, and M, N and K past the last one's beginning."""
    for name, dropout_p in (("x", 0.0), ("x", 0.5), ("lora_A", 0.5), ("lora_B", 0.0), ("dy", 0.0), ("dy", 0.5)):
        check_infinity(backend.name, (17, 40, 72, 12), backend.dtypes[0], name, dropout_p, backend.device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_error_against_fp64(fused, poison, dropout_p):
    seed = seed_for(fused) if dropout_p else None
    for shape, (dtype, adapter) in itertools.product(sizes(fused, SHAPES[1:] + LARGE_RANKS[:1]), cases(fused)):
        p = random_problem(*shape, dtype, adapter, device=fused.device)
        same_dtype = run(p, backend="reference", dropout_p=dropout_p, seed=seed)
        assert_close(
            run(p, backend=fused.name, dropout_p=dropout_p, seed=seed),
            same_dtype,
            truth(p, dropout_p=dropout_p, seed=seed),
        )


def test_dropout_mask_is_the_reference_mask(fused):
    """With A = I and W = 0, h is drop(x) itself: the mask shows element by element."""
    M, K = 37, 48
    for p in (1e-4, 0.5, 0.9):
        problem = random_problem(M, 16, K, K, fused.dtypes[0], bias=False, device=fused.device)
        problem.x.fill_(1.0)
        problem.lora_A.copy_(torch.eye(K))
        problem.scaling = 1.0
        got = run(problem, backend=fused.name, dropout_p=p, seed=seed_for(fused, 2**62 + 7), needs=(False,) * 4)["h"]
        want = dropout_mask(seed_for(fused, 2**62 + 7), M, K, p)
        assert torch.equal(got, want.to(got.dtype))


def test_strided_inputs(fused, poison):
    """Rows of a wider matrix, and transposed storage; the NaNs around the view must not leak in."""
    dtype = fused.dtypes[0]
    p = exact_problem(24, 40, 56, 8, dtype, device=fused.device)
    want = truth(p)

    def surrounded(t):
        wide = torch.full((t.shape[0] + 2, t.shape[1] + 16), float("nan"), dtype=t.dtype, device=t.device)
        wide[1:-1, 8:-8] = t
        return wide[1:-1, 8:-8]

    p.x, p.dy = surrounded(p.x), surrounded(p.dy)
    assert_exact(run(p, backend=fused.name), want)
    p.x, p.dy = p.x.t().contiguous().t(), p.dy.t().contiguous().t()
    assert_exact(run(p, backend=fused.name), want)
    p.lora_A, p.lora_B = p.lora_A.t().contiguous().t(), p.lora_B.t().contiguous().t()
    assert_exact(run(p, backend=fused.name), want)


def test_expanded_gradient(fused):
    """`y.sum().backward()` brings a dy with strides 0."""
    p = exact_problem(9, 16, 24, 4, fused.dtypes[0], device=fused.device)
    p.dy = torch.ones((), dtype=p.dy.dtype, device=p.dy.device).expand(9, 16)
    assert_exact(run(p, backend=fused.name), truth(p))


def test_every_pruning(backend, poison):
    """Each subset of needed gradients gives the same values as all of them."""
    p = exact_problem(17, 24, 40, 8, backend.dtypes[0], device=backend.device)
    everything = truth(p)
    for needs in itertools.product((False, True), repeat=4):
        out = run(p, backend=backend.name, needs=needs)
        assert [out[name] is not None for name in ("dx", "dA", "dB", "dbias")] == list(needs)
        assert_exact(out, everything)


def test_what_is_not_needed_is_not_there(fused):
    """Through autograd x is saved only for dA and h only for dB: the other gradients come without them."""
    p = exact_problem(17, 24, 40, 8, fused.dtypes[0], device=fused.device)
    exact = truth(p)
    for needs in itertools.product((False, True), repeat=3):
        tensors = [t.detach().clone().requires_grad_(need) for t, need in zip((p.x, p.lora_A, p.lora_B), needs)]
        y = lora_linear(tensors[0], p.weight, *tensors[1:], p.scaling, bias=p.bias, backend=fused.name)
        if any(needs):
            y.backward(p.dy)
        assert_exact(dict(zip(("dx", "dA", "dB"), (t.grad for t in tensors))), exact)
        assert [t.grad is not None for t in tensors] == list(needs)


def test_bitwise_determinism(fused):
    """Five runs give the same bits, in deterministic mode."""
    p = random_problem(257, 96, 160, 16, fused.dtypes[0], device=fused.device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(p, backend=fused.name, dropout_p=0.1, seed=seed_for(fused)) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


def test_inputs_are_left_alone(fused):
    p = random_problem(33, 40, 48, 8, fused.dtypes[0], device=fused.device)
    before = [t.clone() for t in (p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.dy)]
    run(p, backend=fused.name, dropout_p=0.5, seed=seed_for(fused))
    assert all(torch.equal(a, b) for a, b in zip(before, (p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.dy)))


def test_assert_close_sees_one_bad_tile(fused):
    """The comparison itself: 16 x 16 zeros in a large result must fail it."""
    p = random_problem(128, 256, 64, 8, fused.dtypes[0], device=fused.device)
    out, peer, exact = run(p, backend=fused.name), run(p, backend="reference"), truth(p)
    assert_close(out, peer, exact)
    out["y"][64:80, 128:144] = 0
    with pytest.raises(AssertionError, match="y: max error"):
        assert_close(out, peer, exact)
