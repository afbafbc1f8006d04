"""LoRA-Pro: the identities of its gradients, small steps, and full fine-tuning's Adam at full rank."""

import pytest
import torch
from pair_problems import R, descend, farthest, loss_of, make_pairs, products_of
from torch import nn

from fused_lora.optim import LoRAProAdamW, Pair
from fused_lora.optim.pro import X_MODES, ClosedForm

N, K = 9, 11


@pytest.fixture
def case():
    """A, B, s and the gradient G of the whole weight, two of each."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return draw(2, R, K), draw(2, N, R), torch.tensor([2.0, 0.3], dtype=torch.float64)[:, None, None], draw(2, N, K)


def gradients(A, B, s, G, x_mode, damping=0.0):
    return ClosedForm(A, B, s, damping).gradients(s * B.mT @ G, s * G @ A.mT, x_mode)


def projectors(A, B):
    eye_N, eye_K = torch.eye(N, dtype=A.dtype), torch.eye(K, dtype=A.dtype)
    return eye_N - B @ torch.linalg.pinv(B), eye_K - torch.linalg.pinv(A) @ A


def close(got, want):
    return torch.allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("x_mode", X_MODES)
def test_the_change_is_the_projection_of_the_full_gradient(case, x_mode):
    A, B, s, G = case
    pro_A, pro_B = gradients(*case, x_mode)
    past_B, past_A = projectors(A, B)
    assert close(s * (B @ pro_A + pro_B @ A), G - past_B @ G @ past_A)


@pytest.mark.parametrize("x_mode", X_MODES)
def test_the_gradients_are_the_formula_with_its_X(case, x_mode):
    """Solved by Kronecker products, and the symmetric X by its two halves of projectors."""
    A, B, s, G = case
    g_A, g_B = s * B.mT @ G, s * G @ A.mT
    inv_B, inv_A = torch.linalg.inv(B.mT @ B), torch.linalg.inv(A @ A.mT)
    past_B, past_A = projectors(A, B)
    pro_A, pro_B = gradients(*case, x_mode)
    X = torch.zeros(2, R, R, dtype=A.dtype)
    if x_mode == "sylvester":
        for i in range(2):
            eye = torch.eye(R, dtype=A.dtype)
            system = torch.kron((B.mT @ B)[i], eye) + torch.kron(eye, (A @ A.mT)[i])
            right = -(inv_B @ g_A @ A.mT / s**2)[i]
            X[i] = torch.linalg.solve(system, right.flatten()).view(R, R)
    if x_mode == "symmetric":
        eye_N, eye_K = torch.eye(N, dtype=A.dtype), torch.eye(K, dtype=A.dtype)
        assert close(pro_A, inv_B @ g_A @ (eye_K + past_A) / 2 / s**2)
        assert close(pro_B, (eye_N + past_B) / 2 @ g_B @ inv_A / s**2)
    else:
        assert close(pro_A, inv_B @ g_A / s**2 + X @ A)
        assert close(pro_B, past_B @ g_B @ inv_A / s**2 - B @ X)


def test_sylvesters_X_is_nearest_to_the_raw_gradients(case):
    A, B, s, G = case
    g_A, g_B = s * B.mT @ G, s * G @ A.mT

    def distance(X):
        pro_A, pro_B = gradients(*case, "sylvester")
        return (pro_A + X @ A - g_A).square().sum() + (pro_B - B @ X - g_B).square().sum()

    X = torch.zeros(2, R, R, dtype=A.dtype, requires_grad=True)
    distance(X).backward()
    assert X.grad.abs().max() < 1e-9
    assert distance(1e-3 * torch.randn(2, R, R, dtype=A.dtype)) > distance(torch.zeros_like(X))


@pytest.mark.parametrize("x_mode", X_MODES)
def test_the_loss_falls_and_by_how_much(case, x_mode):
    A, B, s, G = case
    g_A, g_B = s * B.mT @ G, s * G @ A.mT
    pro_A, pro_B = gradients(*case, x_mode)
    past_B, _ = projectors(A, B)
    slope = (g_A * pro_A).sum() + (g_B * pro_B).sum()
    first = (g_A * (torch.linalg.inv(B.mT @ B) @ g_A / s**2)).sum()
    second = (g_B * (past_B @ g_B @ torch.linalg.inv(A @ A.mT) / s**2)).sum()
    assert first > 0 and second > 0 and close(slope, first + second)


def test_the_full_gradient_is_no_farther_than_from_any_multiple_of_loras(case):
    A, B, s, G = case
    pro_A, pro_B = gradients(*case, "sylvester")
    change = s * (B @ pro_A + pro_B @ A)
    loras = s**2 * (B @ B.mT @ G + G @ A.mT @ A)
    best = (G * loras).sum((1, 2), keepdim=True) / loras.square().sum((1, 2), keepdim=True)
    assert ((G - change).norm(dim=(1, 2)) < (G - best * loras).norm(dim=(1, 2))).all()


def test_the_symmetric_change_does_not_depend_on_the_split_to_second_order(case):
    A, B, s, G = case
    g = torch.Generator().manual_seed(1)
    split = torch.eye(R, dtype=A.dtype) + 0.4 * torch.randn(2, R, R, generator=g, dtype=A.dtype)
    seconds = {}
    for x_mode in X_MODES:
        products = [gradients(a, b, s, G, x_mode) for a, b in ((A, B), (torch.linalg.solve(split, A), B @ split))]
        seconds[x_mode] = [pro_B @ pro_A for pro_A, pro_B in products]
    assert close(*seconds["symmetric"])
    assert not torch.allclose(*seconds["sylvester"], atol=1e-3)


@pytest.mark.parametrize("x_mode", X_MODES)
def test_factors_that_lack_ranks(case, x_mode):
    """B zero, and B of rank 1: the projection is that of what B spans."""
    A, B, s, G = case
    for lacking in (torch.zeros_like(B), B[:, :, :1] @ B[:, :1]):
        pro_A, pro_B = gradients(A, lacking, s, G, x_mode)
        past_B, past_A = projectors(A, lacking)
        assert close(s * (lacking @ pro_A + pro_B @ A), G - past_B @ G @ past_A)
    pro_A, _ = gradients(A, torch.zeros_like(B), s, G, x_mode)
    assert not pro_A.any()


def test_the_inverses_hold_in_fp32_for_tiny_B(case):
    """Damping counts relative to B, whatever its size."""
    A, B, s, G = (t.float() for t in case)
    past_B, past_A = projectors(*(t.double() for t in (A, 2e-5 * B)))
    pro_A, pro_B = gradients(A, 2e-5 * B, s, G, "sylvester", damping=1e-8)
    change = s.double() * (2e-5 * B.double() @ pro_A.double() + pro_B.double() @ A.double())
    want = G.double() - past_B @ G.double() @ past_A
    assert (change - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("x_mode", X_MODES)
def test_a_small_step_is_the_projection_of_adams_direction(x_mode):
    """In full mode Adam's first step is G~ over its own size, and the error falls with the square of lr."""
    errors = []
    for lr in (1e-3, 1e-4):
        pairs = make_pairs()
        before = [W.detach() for W in products_of(pairs)]
        optimizer = LoRAProAdamW(pairs, lr=lr, mode="full", x_mode=x_mode, eps=1e-8)
        wanted = []
        for pair, G in zip(pairs, whole_gradients(before)):
            past_B = torch.eye(len(G), dtype=G.dtype) - pair.B @ torch.linalg.pinv(pair.B)
            past_A = torch.eye(G.shape[1], dtype=G.dtype) - torch.linalg.pinv(pair.A) @ pair.A
            near = G - past_B @ G @ past_A
            u = near / (near.abs() + 1e-8)
            wanted.append(-lr * (u - past_B @ u @ past_A))
        descend(optimizer, pairs, 1)
        errors.append(max((p - b - w).abs().max() for p, b, w in zip(products_of(pairs), before, wanted)).item())
    assert errors[1] < errors[0] / 50


def whole_gradients(products):
    leaves = [W.clone().requires_grad_() for W in products]
    loss_of(leaves).backward()
    return [W.grad for W in leaves]


def test_at_full_rank_full_mode_follows_full_fine_tunings_adam():
    """The whole path: 20 steps of AdamW on the weights themselves, from the same start."""
    errors = []
    for lr in (1e-3, 1e-4):
        g = torch.Generator().manual_seed(0)
        pairs = []
        for i, (n, k) in enumerate(((5, 8), (6, 6))):
            A, B = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((n, k), (n, n)))
            pairs.append(Pair(nn.Parameter(A), nn.Parameter(B), 0.5 + i, f"layer{i}"))
        whole = [nn.Parameter(W.detach().clone()) for W in products_of(pairs)]
        adam = torch.optim.AdamW(whole, lr=lr, weight_decay=0.0)
        descend(LoRAProAdamW(pairs, lr=lr, mode="full"), pairs, 20)
        for _ in range(20):
            adam.zero_grad()
            loss_of(list(whole)).backward()
            adam.step()
        errors.append(farthest([whole], [products_of(pairs)]))
    assert errors[0] < 0.1 * 20 * 1e-3 and errors[1] < errors[0] / 50


def test_efficient_mode_is_adamw_on_the_changed_gradients():
    """The first step from B = 0 included, whose size official code has at 0.744 of it."""
    for zero_B in (True, False):
        pairs, others = make_pairs(zero_B=zero_B), make_pairs(zero_B=zero_B)
        optimizer = LoRAProAdamW(pairs, lr=0.02, weight_decay=0.1)
        adam = torch.optim.AdamW([t for p in others for t in (p.A, p.B)], lr=0.02, weight_decay=0.1)
        for _ in range(10):
            descend(optimizer, pairs, 1)
            adam.zero_grad()
            loss_of(products_of(others)).backward()
            for pair in others:
                s = torch.full((1, 1, 1), pair.scaling, dtype=torch.float64)
                form = ClosedForm(pair.A.detach()[None], pair.B.detach()[None], s, 1e-8)
                changed = form.gradients(pair.A.grad[None], pair.B.grad[None], "sylvester")
                pair.A.grad, pair.B.grad = (t[0].clone() for t in changed)
            adam.step()
        assert farthest([products_of(pairs)], [products_of(others)]) < 1e-9


@pytest.mark.parametrize("mode", ["efficient", "full"])
@pytest.mark.parametrize("x_mode", X_MODES)
def test_it_trains_from_zero(mode, x_mode):
    pairs = make_pairs(torch.float32, zero_B=True)
    before = loss_of(products_of(pairs))
    descend(LoRAProAdamW(pairs, lr=0.02, mode=mode, x_mode=x_mode), pairs, 100)
    assert loss_of(products_of(pairs)) < 0.75 * before


def test_weight_decay_in_full_mode_is_decoupled():
    pairs = make_pairs()
    optimizer = LoRAProAdamW(pairs, lr=0.1, weight_decay=0.5, mode="full")
    before = [pair.A.detach().clone() for pair in pairs]
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    optimizer.step()
    assert all(torch.allclose(pair.A, 0.95 * A) for pair, A in zip(pairs, before))


@pytest.mark.parametrize("change", [{"mode": "fast"}, {"x_mode": "best"}, {"damping": -1.0}])
def test_bad_input(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must"):
        LoRAProAdamW(make_pairs(), lr=0.1, **change)


def test_a_scaling_of_zero_is_refused():
    with pytest.raises(ValueError, match="layer1: scaling must not be 0; got 0"):
        LoRAProAdamW(make_pairs(scalings=(1.0, 0.0, 1.0)), lr=0.1)
