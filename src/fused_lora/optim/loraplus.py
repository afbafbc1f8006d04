"""LoRA+: parameter groups that let B learn faster than A."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fused_lora.optim.pairs import adapters_in, magnitudes


def lora_param_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, *, weight_decay: float = 0.0, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ for any optimizer, which hold all that trains in a model once.

    They are, as far as they have members: A, trained copies of modules and other matrices at lr; A and B of embeddings
    at lr_embedding; B at lr * ratio; biases, norms and other vectors at lr * ratio without weight decay; magnitudes of
    DoRA, which belong to neither factor, at lr without weight decay. Each has its `initial_lr`.

    Args:
        model: with adapters of ours or of PEFT.
        lr: learning rate of A.
        ratio: of B's learning rate to A's, above 0; the paper's are above 1.
        weight_decay: of matrices.
        lr_embedding: learning rate of adapters of embeddings.
    Returns: groups with params, lr, initial_lr and weight_decay.
    Raises: ValueError if a number is out of range or no adapter trains.
    Source: Hayou et al., arXiv 2402.12354.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_embedding", lr_embedding)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0; got {value}")
    if not ratio > 0:
        raise ValueError(f"ratio must be > 0; got {ratio}")
    adapters = list(adapters_in(model))
    factors = {id(a.A): "A" for a in adapters} | {id(a.B): "B" for a in adapters}
    factors |= {id(t): "embedding" for a in adapters if a.embedding for t in (a.A, a.B)}
    kinds = dict.fromkeys(magnitudes(adapters), "magnitudes") | factors
    settings = {
        "A": (lr, weight_decay),
        "embedding": (lr_embedding, weight_decay),
        "B": (lr * ratio, weight_decay),
        "vectors": (lr * ratio, 0.0),
        "magnitudes": (lr, 0.0),
    }
    members: dict[str, list[Tensor]] = {kind: [] for kind in settings}
    for p in model.parameters():
        if p.requires_grad:
            members[kinds.get(id(p), "A" if p.dim() > 1 else "vectors")].append(p)
    if not any(id(p) in factors for params in members.values() for p in params):
        raise ValueError("model must have LoRA adapters that train; got none")
    return [
        {"params": members[kind], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for kind, (rate, decay) in settings.items()
        if members[kind]
    ]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float = 16.0,
    weight_decay: float = 0.0,
    lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer of any class with the learning rates of LoRA+.

    Equivalent to: ``optimizer_cls(lora_param_groups(model, lr, loraplus_lr_ratio, ...), lr=lr, **kwargs)``. The weight
    decay is that of the groups, where Hugging Face PEFT's function of this name takes `loraplus_weight_decay` and
    leaves `weight_decay` without effect; its names `loraplus_weight_decay` and `loraplus_lr_embedding` serve, too.

    Args:
        model: with adapters of ours or of PEFT.
        optimizer_cls: torch.optim.AdamW, say.
        lr, weight_decay, lr_embedding: as in lora_param_groups.
        loraplus_lr_ratio: of B's learning rate to A's.
        kwargs: further arguments of the optimizer.
    Returns: the optimizer.
    Raises: ValueError as lora_param_groups.
    Source: Hayou et al., arXiv 2402.12354.
    """
    weight_decay = kwargs.pop("loraplus_weight_decay", weight_decay)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", lr_embedding)
    groups = lora_param_groups(model, lr, loraplus_lr_ratio, weight_decay=weight_decay, lr_embedding=lr_embedding)
    return optimizer_cls(groups, lr=lr, **kwargs)
