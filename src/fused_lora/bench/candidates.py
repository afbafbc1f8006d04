"""Who is timed: the frozen layer, three ways to write LoRA in PyTorch, PEFT's layer, and ours.

A candidate is made for one problem and gives its forward, x -> y, and its trained leaves (A, B).
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import _C
from fused_lora.backends import line
from fused_lora.nn import LoRALinear
from fused_lora.ops.linear import lora_linear
from fused_lora.testing import Problem


@dataclass(frozen=True)
class Made:
    """A candidate, ready for one problem."""

    forward: Callable[[Tensor], Tensor]
    lora_A: Tensor | None
    lora_B: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.lora_A, self.lora_B) if t is not None]


def _leaves(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Trained copies of A and B."""
    A, B = (t.detach().to(dtype, copy=True).requires_grad_() for t in (p.lora_A, p.lora_B))
    return A, B


def frozen(p: Problem, dropout: float) -> Made:
    """The layer without LoRA: what everything is measured against."""
    return Made(lambda x: F.linear(x, p.weight, p.bias), None, None)


def naive(p: Problem, dropout: float) -> Made:
    """The textbook composition, A and B in x's dtype."""
    A, B = _leaves(p, p.x.dtype)
    return Made(
        lambda x: F.linear(x, p.weight, p.bias) + F.linear(F.linear(F.dropout(x, dropout), A), B) * p.scaling, A, B
    )


class _Addmm(torch.autograd.Function):
    """The strongest simple competitor: one Function, every sum folded into a GEMM's beta."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, dropout):
        low = F.dropout(x, dropout) if dropout else x
        h = (low @ A.t()).mul_(scaling)
        ctx.save_for_backward(low, weight, A, B, h, (low != 0) if dropout else None)
        ctx.scaling, ctx.dropout = scaling, dropout
        return torch.addmm(F.linear(x, weight, bias), h, B.t())

    @staticmethod
    def backward(ctx, dy):
        low, weight, A, B, h, kept = ctx.saved_tensors
        dh = (dy @ B).mul_(ctx.scaling)
        dA, dB = dh.t() @ low, dy.t() @ h
        if kept is None:
            dx = torch.addmm(dy @ weight, dh, A)
        else:
            dx = (dh @ A).mul_(kept).mul_(1 / (1 - ctx.dropout)).addmm_(dy, weight)
        return dx, None, None, dA, dB, None, None


class AddmmLinear(nn.Module):
    """A layer over _Addmm, for whole models; shares weight and bias with `linear`."""

    def __init__(self, linear: nn.Linear, r: int, lora_alpha: float):
        super().__init__()
        self.weight, self.bias, self.scaling = linear.weight, linear.bias, lora_alpha / r
        self.lora_A = nn.Parameter(linear.weight.new_empty(r, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        y = _Addmm.apply(
            x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, 0.0
        )
        return y.view(*x.shape[:-1], -1)


def addmm(p: Problem, dropout: float) -> Made:
    A, B = _leaves(p, p.x.dtype)
    return Made(lambda x: _Addmm.apply(x, p.weight, p.bias, A, B, p.scaling, dropout), A, B)


def _linear(p: Problem) -> nn.Linear:
    linear = nn.Linear(p.x.shape[1], p.weight.shape[0], bias=p.bias is not None, device="meta")
    linear.weight = nn.Parameter(p.weight, requires_grad=False)
    if p.bias is not None:
        linear.bias = nn.Parameter(p.bias, requires_grad=False)
    return linear


# Whose warnings at PEFT's import tell of optional parts that are not there.
_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def import_peft() -> None:
    """PEFT, if it is installed, without what the packages that it imports say of their own optional parts."""
    if importlib.util.find_spec("peft") is None:
        return
    loggers = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("peft")
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def peft(p: Problem, dropout: float) -> Made:
    """PEFT's own layer with its defaults: fp32 A and B over a half-precision base."""
    from peft import LoraConfig, inject_adapter_in_model

    R = p.lora_A.shape[0]
    alpha: Any = p.scaling * R  # a float serves, an int is declared
    config = LoraConfig(r=R, lora_alpha=alpha, lora_dropout=dropout, target_modules=["layer"])
    holder = nn.ModuleDict({"layer": _linear(p)})
    inject_adapter_in_model(config, holder)
    layer: Any = holder["layer"].train()
    if p.x.dtype in (torch.bfloat16, torch.float16):
        layer.lora_A.float(), layer.lora_B.float()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(p.lora_A), B.copy_(p.lora_B)
    return Made(layer, A, B)


def compiled(p: Problem, dropout: float) -> Made:
    """torch.compile of naive."""
    made = naive(p, dropout)
    torch._dynamo.reset()
    return Made(torch.compile(made.forward), made.lora_A, made.lora_B)


def fused(p: Problem, dropout: float) -> Made:
    """fused_lora.LoRALinear, A and B in the problem's adapter dtype."""
    R = p.lora_A.shape[0]
    layer = LoRALinear.from_linear(
        _linear(p), r=R, lora_alpha=p.scaling * R, lora_dropout=dropout, adapter_dtype=p.lora_A.dtype
    ).train()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        A.copy_(p.lora_A), B.copy_(p.lora_B)
    return Made(layer, A, B)


def back_end(name: str) -> Callable[[Problem, float], Made]:
    """lora_linear on one named back end, A and B in the problem's adapter dtype."""

    def make(p: Problem, dropout: float) -> Made:
        A, B = _leaves(p, p.lora_A.dtype)

        def forward(x: Tensor) -> Tensor:
            y = lora_linear(x, p.weight, A, B, p.scaling, bias=p.bias, dropout_p=dropout, backend=name)
            return cast(Tensor, y)  # without return_h it is no pair

        return Made(forward, A, B)

    return make


CANDIDATES: dict[str, Callable[[Problem, float], Made]] = {
    "frozen": frozen,
    "naive": naive,
    "addmm": addmm,
    "peft": peft,
    "compile": compiled,
    "fused": fused,
}


def is_plan(name: str, device: str) -> bool:
    """Whether a name is that of a device's back end with a plan, "cuda:h_shrink"; the back end checks the plan."""
    back_end, _, plan = name.partition(":")
    return bool(plan) and back_end in line(torch.device(device))


def candidates_on(device: str) -> dict[str, Callable[[Problem, float], Made]]:
    """All candidates of a device: on a GPU its back ends one by one, too, whichever of them "fused" takes."""
    if device == "cpu":
        return CANDIDATES
    hopper = _C.build_info()["cuda"] and torch.cuda.get_device_capability() == (9, 0)
    return CANDIDATES | {name: back_end(name) for name in ("triton", *(("cuda",) if hopper else ()))}
