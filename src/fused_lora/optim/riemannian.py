"""Riemannian preconditioning: any optimizer on gradients of A and B that each other's Gram matrix preconditions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_lora.optim.batches import Batch
from fused_lora.optim.changed_gradients import change_gradients
from fused_lora.optim.pairs import lora_pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: Callable[..., Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of a class for all that trains in a model, whose steps precondition the gradients of LoRA pairs.

    Equivalent to, before each step of the optimizer, for each pair::

        A.grad = inv(B.T @ B + reg * eye) @ A.grad
        B.grad = B.grad @ inv(A @ A.T + reg * eye)

    Args:
        model: with adapters of ours or of PEFT.
        optimizer_cls: torch.optim.AdamW or SGD, say; its step gets no closure.
        lr: learning rate.
        reg: added to the diagonals of the Gram matrices.
        kwargs: further arguments of the optimizer.
    Returns: the optimizer; `.grad` holds the preconditioned gradients after a step.
    Raises: ValueError if no pair trains or reg is not positive; a step raises it for a closure.
    Source: Zhang and Pilanci, arXiv 2402.02347; name and defaults are those of Hugging Face PEFT, which leaves
        embeddings out.
    """
    if not reg > 0:
        raise ValueError(f"reg must be > 0; got {reg}")
    pairs = lora_pairs(model)
    if not pairs:
        raise ValueError("model must have LoRA pairs that train; got none")
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)

    def change(batch: Batch) -> dict[str, Tensor]:
        damping = reg * torch.eye(batch.A.shape[1], dtype=batch.A.dtype, device=batch.A.device)
        return {
            "A": torch.linalg.solve(batch.B.mT @ batch.B + damping, batch.g_A),
            "B": torch.linalg.solve(batch.A @ batch.A.mT + damping, batch.g_B, left=False),
        }

    change_gradients(optimizer, pairs, change)
    return optimizer
