"""LoRA-RITE: steps of B A that do not depend on the split into factors, and the equations in a plain loop."""

import pytest
import torch
from pair_problems import R, descend, farthest, loss_of, make_pairs, products_of, regauged
from torch import nn

from fused_lora.optim import LoRARite, Pair

OPTIONS = [
    {},
    {"escape": True},
    {"relative_eps": False},
    {"clip_norm": None, "weight_decay": 0.1},
    {"clip_norm": 0.02},
    {"skip_rms": 0.03, "clip_norm": None},
]


def random_factors(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.eye(R, dtype=dtype) + 0.5 * torch.randn(R, R, generator=g, dtype=dtype) for _ in range(3)]


def pinv(t):
    return torch.linalg.pinv(t)


class Loop:
    """The equations of LoRA-RITE, one pair and one matrix after another."""

    def __init__(self, pairs, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, clip_norm=1.0, skip_rms=None,
                 relative_eps=True, escape=False):  # fmt: skip
        self.__dict__.update(locals())
        self.t, self.state = 0, [None] * len(pairs)

    def zero_grad(self):
        for pair in self.pairs:
            pair.A.grad = pair.B.grad = None

    def inverse_root(self, V, rho):
        values, Q = torch.linalg.eigh(V)
        values = values.clamp(min=0) + rho
        root = (values + self.eps * values.max()).sqrt() if self.relative_eps else values.sqrt() + self.eps
        return Q @ torch.diag(torch.where(root > 0, 1 / root, 0)) @ Q.T

    def lost(self, V, turned):
        largest = (torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(turned)).max().clamp(min=0)
        return torch.minimum(largest, (V.trace() - turned.trace()).clamp(min=0))

    @torch.no_grad()
    def step(self):
        self.t += 1
        beta1, beta2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        split = []
        for pair in self.pairs:
            (U_B, R_B), (U_A, R_A) = torch.linalg.qr(pair.B), torch.linalg.qr(pair.A.T)
            G_A, G_B = pinv(R_B).T @ pair.A.grad, pair.B.grad @ pinv(R_A)
            if self.skip_rms is not None:
                G_A, G_B = (G * (G.square().mean() <= self.skip_rms**2) for G in (G_A, G_B))
            split.append((U_B, R_B, U_A, R_A, G_A, G_B))
        norm = sum(G.square().sum() for parts in split for G in parts[4:]).sqrt()
        factor = 1.0 if self.clip_norm is None else min(1.0, self.clip_norm / norm)
        for i, (pair, (U_B, R_B, U_A, R_A, G_A, G_B)) in enumerate(zip(self.pairs, split)):
            G_A, G_B = G_A * factor, G_B * factor
            if self.state[i] is None:
                zero = U_A.new_zeros
                self.state[i] = [
                    U_B,
                    U_A,
                    zero(R, R),
                    zero(R, R),
                    torch.zeros_like(G_A),
                    torch.zeros_like(G_B),
                    0.0,
                    0.0,
                ]
            U_B_before, U_A_before, V_A, V_B, M_A, M_B, rho_A, rho_B = self.state[i]
            P_A, P_B = U_B.T @ U_B_before, U_A.T @ U_A_before
            turned_A, turned_B = P_A @ V_A @ P_A.T, P_B @ V_B @ P_B.T
            if self.escape:
                rho_A, rho_B = beta2 * (rho_A + self.lost(V_A, turned_A)), beta2 * (rho_B + self.lost(V_B, turned_B))
            V_A = beta2 * turned_A + (1 - beta2) * G_A @ G_A.T / G_A.shape[1]
            V_B = beta2 * turned_B + (1 - beta2) * G_B.T @ G_B / G_B.shape[0]
            M_A = beta1 * P_A @ M_A + (1 - beta1) * self.inverse_root(V_A, rho_A) @ G_A
            M_B = beta1 * M_B @ P_B.T + (1 - beta1) * G_B @ self.inverse_root(V_B, rho_B)
            pair.A.sub_(self.lr * (pinv(R_B) @ M_A + self.weight_decay * pair.A))
            pair.B.sub_(self.lr * (M_B @ pinv(R_A).T + self.weight_decay * pair.B))
            self.state[i] = [U_B, U_A, V_A, V_B, M_A, M_B, rho_A, rho_B]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("zero_B", [False, True])
def test_the_steps_are_those_of_the_plain_loop(options, zero_B):
    ours, loops = make_pairs(zero_B=zero_B), make_pairs(zero_B=zero_B)
    got = descend(LoRARite(ours, lr=0.05, **options), ours, 15)
    want = descend(Loop(loops, lr=0.05, **options), loops, 15)
    assert farthest(got, want) < 1e-9
    assert farthest(got[:1], got[-1:]) > 1e-2


@pytest.mark.parametrize("options", [{}, {"escape": True}, {"relative_eps": False}], ids=str)
def test_the_trajectory_of_the_products_is_the_same_however_they_are_split(options):
    pairs = make_pairs()
    others = regauged(pairs, random_factors(1))
    large = regauged(pairs, [30.0 * torch.eye(R, dtype=torch.float64)] * 3)
    reference = descend(LoRARite(pairs, lr=0.05, **options), pairs, 15)
    for split in (others, large):
        assert farthest(reference, descend(LoRARite(split, lr=0.05, **options), split, 15)) < 1e-6


def test_adams_is_not():
    pairs = make_pairs()
    others = regauged(pairs, random_factors(1))
    got = [
        descend(torch.optim.Adam([t for p in some for t in (p.A, p.B)], lr=0.05), some, 15) for some in (pairs, others)
    ]
    assert farthest(*got) > 1e-2


def test_in_fp32_the_split_makes_a_difference_of_rounding():
    pairs = make_pairs(torch.float32)
    others = regauged(pairs, random_factors(1, torch.float32))
    reference = descend(LoRARite(pairs, lr=0.05), pairs, 15)
    assert farthest(reference, descend(LoRARite(others, lr=0.05), others, 15)) < 1e-3


def test_the_first_step_from_B_zero_moves_B_alone():
    pairs = make_pairs(zero_B=True)
    starts = [pair.A.detach().clone() for pair in pairs]
    descend(LoRARite(pairs, lr=0.05), pairs, 1)
    assert all(torch.equal(pair.A, start) for pair, start in zip(pairs, starts))
    assert all(pair.B.abs().max() > 1e-3 for pair in pairs)


def test_factors_that_lack_ranks_train_and_stay_finite():
    """B of one column twice, A of fewer columns than rows, gradients of zero."""
    pairs = make_pairs(torch.float32)
    with torch.no_grad():
        pairs[0].B[:, 1] = pairs[0].B[:, 0]
    pairs.append(Pair(nn.Parameter(torch.randn(R, 2)), nn.Parameter(torch.zeros(4, R)), 1.0, "thin"))
    optimizer = LoRARite(pairs, lr=0.05)
    before = loss_of(products_of(pairs))
    descend(optimizer, pairs, 100)
    assert loss_of(products_of(pairs)) < 0.5 * before
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(t.isfinite().all() for pair in pairs for t in (pair.A, pair.B))


def test_skip_can_stop_a_training_and_is_off_by_default():
    frozen, moving = make_pairs(), make_pairs()
    start = [[W.detach() for W in products_of(frozen)]]
    assert farthest(start, descend(LoRARite(frozen, lr=0.05, skip_rms=1e-6), frozen, 3)[-1:]) == 0
    assert farthest(start, descend(LoRARite(moving, lr=0.05), moving, 3)[-1:]) > 1e-2


def test_the_clip_counts_all_groups():
    together, apart = make_pairs(), make_pairs()
    one = LoRARite(together, lr=0.05, clip_norm=0.01, eps=1e-2, relative_eps=False)
    groups = [{"params": apart[:1]}, {"params": apart[1:]}]
    other = LoRARite(groups, lr=0.05, clip_norm=0.01, eps=1e-2, relative_eps=False)
    assert farthest(descend(one, together, 5), descend(other, apart, 5)) < 1e-12


def test_groups_have_their_own_learning_rate_and_betas():
    pairs, alone = make_pairs(), make_pairs()
    groups = [{"params": pairs[:1], "lr": 0.0}, {"params": pairs[1:2], "betas": (0.5, 0.9)}, {"params": pairs[2:]}]
    trajectory = descend(LoRARite(groups, lr=0.05, clip_norm=None), pairs, 10)
    same = descend(LoRARite(alone, lr=0.05, clip_norm=None), alone, 10)
    fast = make_pairs()
    faster = descend(LoRARite(fast, lr=0.05, betas=(0.5, 0.9), clip_norm=None), fast, 10)
    assert torch.equal(trajectory[0][0], trajectory[-1][0])
    assert torch.allclose(trajectory[-1][1], faster[-1][1], atol=1e-12)
    assert torch.allclose(trajectory[-1][2], same[-1][2], atol=1e-12)
    assert not torch.allclose(same[-1][1], faster[-1][1], atol=1e-3)
