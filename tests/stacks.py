"""A small model of three blocks with adapters."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Two linear layers, not square, over a residual stream."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Blocks in a row; `reentrant` checkpoints each, in that way."""

    def __init__(self, blocks: int = 3, size: int = 6, inner: int = 10):
        super().__init__()
        self.layers = nn.ModuleList(Block(size, inner) for _ in range(blocks))
        self.reentrant: bool | None = None

    def forward(self, x):
        for block in self.layers:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter, past what counts writes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of what has one, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
