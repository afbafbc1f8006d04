"""Checks that run in two processes of a gloo group, and a tiny decoder for them that needs PyTorch alone."""

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora.adapters import apply_lora


def outcomes(script: str, directory: Path) -> dict[str, list]:
    """What `run_checks` found in each of two processes that run the script: for each check None, or its traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    here = os.path.dirname(__file__)
    environment = os.environ | address | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here, "FUSED_LORA_TUNED": "0"}
    command = [sys.executable, script]
    ranks = [
        subprocess.Popen([*command, str(rank), str(directory)], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=300)[1].decode()[-3000:] for rank in ranks]
    finally:  # one that waits for the other is no use to anybody
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    found = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [one[name] for one in found] for name in found[0]}


def run_checks(checks: Iterable[Callable[[Path], None]], rank: int, directory: Path) -> None:
    """Run every check in this process, whatever the one before it found, and write down what was found."""
    importlib.import_module("torch._dynamo")  # before the group, as in finetune.processes
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, str | None] = {}
    for check in checks:
        try:
            check(directory)
            found[check.__name__] = None
        except (Exception, pytest.fail.Exception):
            found[check.__name__] = traceback.format_exc()
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed keeps groups of its own, whose threads may abort an interpreter that comes to its end


class Collectives(TorchDispatchMode):
    """Counts the collective operations of DTensors by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the collectives
        name = func.__name__.partition(".")[0]
        if func.namespace == "_c10d_functional" and name.startswith("all_"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """Attention and MLP; the heads are counted by their width, so that a process may hold some of them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.o, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        q, k, v = (layer(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(x)))


TARGETS = ("q", "k", "v", "o", "up", "down")  # all but the head


class Decoder(nn.Module):
    """x [M, T, 16] to logits [M, T, 32]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 32)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted(seed: int = 1, **lora) -> nn.Module:
    """The decoder with trained-looking adapters on all layers but the head."""
    model = apply_lora(Decoder(), 4, target_modules=list(TARGETS), **lora)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


def batch(part: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x [2, 5, 16] and labels [2, 5] of one of two parts."""
    g = torch.Generator().manual_seed(part)
    return torch.randn(2, 5, 16, generator=g).to(dtype), torch.randint(32, (2, 5), generator=g)


def loss_of(model: nn.Module, part: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, labels = batch(part, dtype)
    return F.cross_entropy(model(x).flatten(0, 1).to(torch.promote_types(dtype, torch.float32)), labels.flatten())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by the plain model's names."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def whole(t: Tensor) -> Tensor:
    """A DTensor gathered from both processes, any other tensor as it is."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def steps(model: nn.Module, losses: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """Every gradient of the first of two steps, and every value after the second.

    Args:
        model: the model.
        losses: runs the model forward and backward.
    """
    parameters = trained(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01, momentum=0.9)
    found = {}
    for step in range(2):
        losses(model)
        if step == 0:
            found = {f"d {name}": whole(p.grad).clone() for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: whole(p).clone() for name, p in parameters.items()}
