"""One layer with a different adapter for each sample of a batch: ours, PEFT's loop, batched products, and one adapter
for all, forward and backward in one interleaved run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.bench.runner import WrongResult, check, prepare, ratio_facts
from fused_lora.bench.timing import Pass, Spread, copies, cpu_pass, gpu_pass, interleave, ratio
from fused_lora.ops.grouped_linear import grouped_lora_linear
from fused_lora.ops.linear import lora_linear

SCALING, R = 2.0, 16


@dataclass(frozen=True)
class MixedCase:
    """A batch of `adapters` samples, M rows in all, x [M, K] and W [N, K]."""

    adapters: int
    M: int = 2048
    K: int = 1024
    N: int = 1024
    dtype: torch.dtype = torch.float32


def mixed_cases() -> list[MixedCase]:
    """From two adapters to a row in eight."""
    return [MixedCase(count, dtype=dtype) for dtype in (torch.float32, torch.bfloat16) for count in (2, 8, 32, 256)]


@dataclass(frozen=True)
class _Problem:
    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    weight: Tensor  # [N, K]
    lora_A: list[Tensor]  # fp32 [R, K] each
    lora_B: list[Tensor]  # fp32 [N, R] each

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Trained copies of the factors."""
        A, B = ([t.clone().requires_grad_() for t in factors] for factors in (self.lora_A, self.lora_B))
        return A, B


Made = tuple[Callable[[Tensor], Tensor], list[Tensor]]  # x -> y, and what trains


def _problem(case: MixedCase, device: str) -> _Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(rows, cols, generator=generator, device=device) / cols**0.5).to(dtype)

    x, dy = normal(case.M, case.K, case.dtype), normal(case.M, case.N, case.dtype)
    factors = [[normal(*shape) for _ in range(case.adapters)] for shape in ((R, case.K), (case.N, R))]
    return _Problem(x, dy, normal(case.N, case.K, case.dtype), *factors)


def _frozen(p: _Problem) -> Made:
    return lambda x: F.linear(x, p.weight), []


def _one_adapter(p: _Problem) -> Made:
    (A, *_), (B, *_) = p.leaves()
    return lambda x: cast(Tensor, lora_linear(x, p.weight, A, B, SCALING)), [A, B]


def _fused(p: _Problem) -> Made:
    """What the layer runs."""
    A, B = p.leaves()
    M, G = p.x.shape[0], len(A)
    offsets = torch.arange(0, M + 1, M // G, device=p.x.device)
    segments = [SCALING] * G, offsets, None, [0.0] * G
    return lambda x: grouped_lora_linear(x, p.weight, None, A, B, *segments), [*A, *B]


def _batched(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Two batched products over stacked factors in x's dtype: samples of one length are their best case."""
    low = torch.bmm(x.view(len(A), -1, x.shape[1]), A.mT)
    return F.linear(x, weight) + SCALING * torch.bmm(low, B.mT).view(x.shape[0], -1)


def _padded(p: _Problem) -> Made:
    """That of the adapters' own parameters, stacked in every step, as what is to be saved and switched by itself is."""
    A, B = p.leaves()
    stacked = lambda factors: torch.stack(factors).to(p.x.dtype)  # noqa: E731
    return lambda x: _batched(x, p.weight, stacked(A), stacked(B)), [*A, *B]


def _bmm(p: _Problem) -> Made:
    """That of two parameters in x's dtype which hold the factors of all adapters: what it costs at the least."""
    A, B = (torch.stack(t).to(p.x.dtype).requires_grad_() for t in (p.lora_A, p.lora_B))
    return lambda x: _batched(x, p.weight, A, B), [A, B]


def _peft(p: _Problem) -> Made:
    """PEFT's layer, which mixes adapters outside of training; without dropout that is the same."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = nn.Linear(p.x.shape[1], p.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(p.weight, requires_grad=False)
    holder, names = nn.ModuleDict({"layer": linear}), [str(g) for g in range(len(p.lora_A))]
    config = LoraConfig(r=R, lora_alpha=int(SCALING * R), target_modules=["layer"])
    inject_adapter_in_model(config, holder, adapter_name=names[0])
    layer: Any = holder["layer"].eval()
    for name in names[1:]:
        layer.update_layer(name, R, lora_alpha=int(SCALING * R), config=config)
    for name, A, B in zip(names, p.lora_A, p.lora_B):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A.clone(), B.clone()
    leaves = [factors[name].weight.requires_grad_() for factors in (layer.lora_A, layer.lora_B) for name in names]

    def forward(x: Tensor) -> Tensor:
        return layer(x.view(len(names), -1, x.shape[1]), adapter_names=names).view(x.shape[0], -1)

    return forward, leaves


CANDIDATES: dict[str, Callable[[_Problem], Made]] = {
    "frozen": _frozen,
    "one adapter": _one_adapter,
    "fused": _fused,
    "peft": _peft,
    "padded": _padded,
    "bmm": _bmm,
}


def _truth(p: _Problem, count: int) -> dict[str, Tensor]:
    """y and the gradients in fp64 by a loop over the first `count` adapters, those of the factors stacked."""
    x, factors = p.x.detach().double().requires_grad_(), [t.double() for t in (*p.lora_A[:count], *p.lora_B[:count])]
    A, B = ([t.requires_grad_() for t in part] for part in (factors[:count], factors[count:]))
    y = x @ p.weight.double().t()
    if count:
        y = y + torch.cat([SCALING * r @ a.t() @ b.t() for r, a, b in zip(x.chunk(count), A, B)])
    dx, *grads = torch.autograd.grad(y, [x, *A, *B], p.dy.double())
    return dict(y=y.detach(), dx=dx) | _stacked(grads)


def _stacked(grads: list[Tensor]) -> dict[str, Tensor]:
    """Gradients [G, R, K] and [G, N, R] of G factors A and as many B, or of two stacks."""
    split = len(grads) // 2
    stack = torch.cat if grads and grads[0].dim() == 3 else torch.stack
    return dict(dA=stack(grads[:split]), dB=stack(grads[split:])) if grads else {}


def _check(name: str, made: Made, p: _Problem, exact: dict[str, Tensor]) -> None:
    """y and all gradients against fp64, as `runner.check` does. Raises: WrongResult."""
    forward, leaves = made
    x = p.x.detach().requires_grad_()
    y = forward(x)
    y.backward(p.dy)
    grads = [leaf.grad for leaf in (x, *leaves) if leaf.grad is not None]
    if len(grads) != 1 + len(leaves):
        raise WrongResult(f"{name}: {1 + len(leaves) - len(grads)} of {1 + len(leaves)} gradients are missing")
    check(name, dict(y=y.detach(), dx=grads[0]) | _stacked(grads[1:]), exact, p.x.dtype)
    for leaf in leaves:
        leaf.grad = None


def run_mixed(cases: list[MixedCase], device: str, budget_s: float, least: int = 5) -> Iterator[list[dict]]:
    """For each case a row per candidate: milliseconds of forward and backward, over frozen and over one adapter; or
    that it was dropped, and why.

    Args:
        cases: the batches.
        device: cpu or cuda.
        budget_s: seconds of timing a case.
        least: rounds at the least.
    """
    for case in cases:
        yield _case_rows(case, device, budget_s, least)


def _case_rows(case: MixedCase, device: str, budget_s: float, least: int) -> list[dict]:
    p = _problem(case, device)
    inputs = copies(p.x)
    exact = _truth(p, case.adapters)
    others = {"frozen": _truth(p, 0), "one adapter": _truth(p, 1)}

    def make(name: str) -> Pass:
        made = CANDIDATES[name](p)
        _check(name, made, p, others.get(name, exact))
        one = (cpu_pass if device == "cpu" else gpu_pass)(made[0], inputs, p.dy, made[1])
        one()
        return one

    passes, dropped = prepare(list(CANDIDATES), make)
    times = interleave(passes, budget_s=budget_s, least=least)
    facts = vars(case) | dict(dtype=str(case.dtype)[6:])
    rows = {n: facts | dict(candidate=n) | why for n, why in dropped.items()}
    for name, series in times.items():
        rows[name] = facts | dict(candidate=name) | Spread.of(series.seconds()).facts("both", "ms", 1e3)
        rows[name] |= ratio_facts("ratio", ratio(series, times["frozen"]))
        rows[name] |= ratio_facts("over_one", ratio(series, times["one adapter"]))
    return [rows[name] for name in CANDIDATES]
