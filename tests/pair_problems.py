"""Small problems for optimizers of LoRA pairs: losses of matrices s B A, and a model with a head and a norm."""

import torch
from torch import Tensor, nn

from fused_lora import LoRALinear
from fused_lora.optim import Pair

SHAPES = [(7, 9), (5, 6), (7, 9)]  # N, K: two alike and one other
R = 3


def make_pairs(dtype=torch.float64, zero_B=False, seed=0, scalings=(2.0, 0.5, 0.7)) -> list[Pair]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    pairs = []
    for i, ((N, K), scaling) in enumerate(zip(SHAPES, scalings)):
        A, B = draw(R, K), draw(N, R) * (0.0 if zero_B else 0.5)
        pairs.append(Pair(nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype)), scaling, f"layer{i}"))
    return pairs


def loss_of(products: list[Tensor]) -> Tensor:
    """Of the changes s B A [N, K] of the weights, neither quadratic nor symmetric."""
    g = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=products[0].dtype)
    for W in products:
        target = torch.randn(W.shape, generator=g, dtype=torch.float64).to(W.dtype)
        total = total + (W - target).square().mean() + (0.3 * W.pow(3)).sin().mean()
    return total


def products_of(pairs: list[Pair]) -> list[Tensor]:
    return [pair.scaling * pair.B @ pair.A for pair in pairs]


def descend(optimizer, pairs: list[Pair], steps: int, scheduler=None) -> list[list[Tensor]]:
    """The products after each step."""
    trajectory = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(products_of(pairs)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        trajectory.append([W.detach().clone() for W in products_of(pairs)])
    return trajectory


def farthest(one: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """The largest difference of two trajectories."""
    return max((a - b).abs().max().item() for x, y in zip(one, other) for a, b in zip(x, y))


def regauged(pairs: list[Pair], factors: list[Tensor]) -> list[Pair]:
    """The same products of R^-1 A and B R."""
    return [
        Pair(nn.Parameter(torch.linalg.solve(f, p.A.detach())), nn.Parameter(p.B.detach() @ f), p.scaling, p.name)
        for p, f in zip(pairs, factors)
    ]


class Net(nn.Module):
    """Two adapted layers, a trained norm and a trained head."""

    def __init__(self, dtype=torch.float32, adapter_dtype=torch.float32):
        super().__init__()
        torch.manual_seed(3)
        options = dict(r=3, lora_alpha=6, dtype=dtype, adapter_dtype=adapter_dtype)
        self.first = LoRALinear(8, 10, **options)
        self.norm = nn.LayerNorm(10, dtype=dtype)
        self.second = LoRALinear(10, 8, use_rslora=True, **options)
        self.head = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.norm(self.first(x)))))


def train(model: nn.Module, optimizer, steps: int, first=0, scheduler=None) -> None:
    """Steps on batches that depend on the step's number alone."""
    dtype = next(model.parameters()).dtype
    for i in range(first, first + steps):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(6, 8, generator=g).to(dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
