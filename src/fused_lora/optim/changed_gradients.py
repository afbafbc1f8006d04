"""Any optimizer on changed gradients of pairs: what Riemannian preconditioning and LoRA-FA have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_lora.optim.batches import Batch, batches
from fused_lora.optim.pairs import Pair, replaced


def change_gradients(optimizer: Optimizer, pairs: list[Pair], change: Callable[[Batch], dict[str, Tensor]]) -> None:
    """Let an optimizer begin each step with other gradients of the pairs.

    Args:
        optimizer: whose step then takes no closure, which would compute the gradients after the change.
        pairs: the pairs.
        change: the gradients of "A" [P, R, K] and "B" [P, N, R], or of one of them, as they shall be.
    Raises: ValueError in a step, where others stand in the place of the pairs' tensors.
    """

    @torch.no_grad()
    def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise ValueError("step() must have no closure, gradients are changed before it; got one")
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not all(id(pair.A) in stepped or id(pair.B) in stepped for pair in pairs):
            raise replaced(f"{type(optimizer).__name__} on changed gradients")
        with_gradients = [pair for pair in pairs if pair.A.grad is not None or pair.B.grad is not None]
        for batch in batches({}, with_gradients, [1] * len(with_gradients)):
            for which, gradients in change(batch).items():
                for t, gradient in zip(batch.tensors(which), batch.shaped(which, gradients)):
                    if t.grad is not None:
                        t.grad.copy_(gradient)

    optimizer.register_step_pre_hook(before_step)
