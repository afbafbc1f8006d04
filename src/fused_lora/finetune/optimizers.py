"""The optimizers that a run can have, by the names of the command line."""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from fused_lora import optim
from fused_lora.finetune.settings import Settings


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of all that trains in a model; each group's `initial_lr` is what the schedule scales."""
    lr: dict[str, Any] = dict(lr=settings.lr)
    decay: dict[str, Any] = dict(weight_decay=settings.weight_decay)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    match settings.optimizer:
        case "loraplus":
            optimizer = optim.create_loraplus_optimizer(model, AdamW, fused=True, **lr, **decay)
        case "rite":
            optimizer = optim.LoRARite(model, clip_norm=settings.max_grad_norm or None, **lr, **decay)
        case "pro":
            optimizer = optim.LoRAProAdamW(model, **lr, **decay)
        case "riemannian":
            optimizer = optim.create_riemannian_optimizer(model, AdamW, fused=True, **lr, **decay)
        case "lora-fa":
            optimizer = optim.create_lorafa_optimizer(model, **lr, **decay)
        case "lion":
            optimizer = optim.Lion(trained, betas=(0.9, 0.95), **lr, **decay)  # of "LoRA Learns Less and Forgets Less"
        case _:
            optimizer = AdamW(trained, fused=True, **lr, **decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
