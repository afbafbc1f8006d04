"""ALLoRA: gradients of A and B that shrink row by row as the rows of B A grow.

    dL/d(BA)_i  times  c_i = 1 / sqrt(|(BA)_i| + 1 / eta^2),  for A and B only; forward and dx are plain LoRA's

It is `grad_row_scale = c` of the op, with a scaling of 1: c starts at eta, since B starts at zero. A second mode, ours,
scales the steps of B instead.
Source: Huang, Balestriero, "ALLoRA", arXiv 2410.09692, section 4.2: the norm of a row of the product, not squared.
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fused_lora.backends import cpu_norm
from fused_lora.deepspeed_zero import is_copied, is_split
from fused_lora.ops.autograd import plain_eager
from fused_lora.ops.internals import without_autocast
from fused_lora.variants import Update
from fused_lora.variants.once import OncePerStep


@torch.no_grad()
def product_norms(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The norms of the rows of B A [N] of A [R, K] and B [N, R], in fp32 at least; B A is not formed."""
    if plain_eager(lora_A, lora_B) and cpu_norm.serves(lora_A, lora_B):
        return cpu_norm.product_norms(lora_A, lora_B)
    with without_autocast(lora_A):
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        return (B @ (A @ A.t()) * B).sum(1).clamp_min_(0.0).sqrt_()


@torch.no_grad()
def row_scale(lora_A: Tensor, lora_B: Tensor, eta: float) -> Tensor:
    """c [N] of A [R, K] and B [N, R], in fp32 at least."""
    return (product_norms(lora_A, lora_B) + 1.0 / eta**2).rsqrt_()


class ALLoRA:
    """ALLoRA of one adapter in one layer, whose scaling is 1 and which has no dropout.

    Args:
        adapter_name: the adapter's name.
        eta: what the gradients of A and B are multiplied by where B is zero.
    """

    def __init__(self, adapter_name: str, eta: float):
        self.adapter_name, self.eta = adapter_name, eta
        self._scale = OncePerStep()

    def update(self, layer: Any, x: Tensor) -> Update:
        """See LayerVariant."""
        name = self.adapter_name
        lora_A, lora_B = layer.factors(name)
        update = Update(lora_A, lora_B, layer.scaling[name], 0.0, {})
        if not torch.is_grad_enabled() or is_exporting():
            return update
        scale = self._scale(lambda: row_scale(lora_A, lora_B, self.eta), lora_A, lora_B)
        return update._replace(optional={"grad_row_scale": scale})

    def forget(self) -> None:
        """Compute c anew next time."""
        self._scale.forget()


_live: "WeakSet[ScaledSteps]" = WeakSet()
_hooks: list[RemovableHandle] = []  # on every optimizer's step, from the first adapter of this kind on


class ScaledSteps:
    """ALLoRA of one adapter in one layer with `allora_mode="update"`, which is ours and not the paper's.

    Row n of what an optimizer's step does to B counts c_n / eta = 1 / sqrt(1 + eta^2 |(BA)_n|) times, c of the values
    before the step; forward, gradients and the step of A are plain LoRA's. Adam divides a constant factor of a gradient
    out again, so that the paper's way acts through the change of c alone; this one acts under every optimizer.

    Equivalent to, around `optimizer.step()`::

        before, w = B.clone(), 1 / sqrt(1 + eta**2 * vector_norm(B @ A, dim=1))
        optimizer.step()
        B.copy_(before + w[:, None] * (B - before))

    Args:
        adapter_name: the adapter's name.
        eta: as in ALLoRA.
        lora_As, lora_Bs: the layer's A [R, K] and B [N, R] by adapter.
    """

    def __init__(self, adapter_name: str, eta: float, lora_As: Any, lora_Bs: Any):
        self.adapter_name, self.eta = adapter_name, eta
        self._As, self._Bs = lora_As, lora_Bs
        self._before: tuple[Tensor, Tensor] | None = None  # B and w, while an optimizer steps
        _watch(self)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_before": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _watch(self)

    def update(self, layer: Any, x: Tensor) -> Update:
        """See LayerVariant. Raises: ValueError where no optimizer can hold B."""
        if torch.is_grad_enabled():
            self.check()
        name = self.adapter_name
        lora_A, lora_B = layer.factors(name)
        return Update(lora_A, lora_B, layer.scaling[name], 0.0, {})

    def forget(self) -> None:
        """Nothing is kept."""

    @property
    def lora_B(self) -> Tensor:
        """B, whole or a DTensor."""
        return self._Bs[self.adapter_name]

    def check(self) -> None:
        """Raises ValueError for FSDP1's B, a view in the forward and a piece of a vector in an optimizer, and for
        ZeRO's, of which the optimizer has a copy."""
        lora_B = self.lora_B
        if is_copied(lora_B) or is_split(lora_B):
            raise ValueError(
                "allora_mode='update', which needs an optimizer with B, and DeepSpeed's ZeRO, whose optimizer has a "
                "copy, exclude each other; got a B that ZeRO has"
            )
        if not isinstance(lora_B, nn.Parameter) or lora_B.dim() != 2:
            raise ValueError(
                "allora_mode='update', which needs an optimizer with B, and FullyShardedDataParallel exclude each "
                f"other: shard by fully_shard; got a B of {type(lora_B)} and shape {list(lora_B.shape)}"
            )

    @torch.no_grad()
    def begin(self) -> None:
        """Remember B as it is before a step."""
        self.check()
        lora_B = self.lora_B
        norms = product_norms(self._As[self.adapter_name], lora_B)
        self._before = lora_B.to(norms.dtype, copy=True), torch.rsqrt(1.0 + self.eta**2 * norms)

    @torch.no_grad()
    def end(self) -> None:
        """Scale what the step has done. An optimizer that steps within another's step ends it for both."""
        if self._before is not None:
            (before, w), lora_B = self._before, self.lora_B
            lora_B.copy_(before + w[:, None] * (lora_B - before))
            self._before = None


def _watch(steps: ScaledSteps) -> None:
    _live.add(steps)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_begin))
        _hooks.append(register_optimizer_step_post_hook(_end))


def _of(optimizer: Optimizer) -> list[ScaledSteps]:
    """Those whose B an optimizer trains, in its order, which is the same in all processes of a group."""
    by_id = {id(steps.lora_B): steps for steps in _live}
    held = (p for group in optimizer.param_groups for p in group["params"]) if by_id else ()
    return [by_id[id(p)] for p in held if id(p) in by_id]


def _begin(optimizer: Optimizer, *_: Any) -> None:
    for steps in _of(optimizer):
        steps.begin()


def _end(optimizer: Optimizer, *_: Any) -> None:
    for steps in _of(optimizer):
        steps.end()
