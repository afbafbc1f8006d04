"""LoRA-FA: A stays as it is, and B takes the steps that are nearest to full fine-tuning's."""

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fused_lora.optim.batches import Batch
from fused_lora.optim.changed_gradients import change_gradients
from fused_lora.optim.pairs import adapters_in
from fused_lora.optim.whitening import whiten


def create_lorafa_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> AdamW:
    """Freezes the A of a model's adapters and returns an AdamW for all else that trains, with LoRA-FA's gradients of B.
    Adapters of embeddings, whose A begins at zero, train both factors by AdamW.

    Equivalent to, before each step of AdamW, for each B that trains::

        B.grad = B.grad @ inv(A @ A.T) / scaling**2

    Without a gradient of A the backward keeps h [..., R] of a layer, and not x [..., K].

    Args:
        model: with adapters of ours or of PEFT; scalings are the layers' own.
        lr, betas, eps, weight_decay: AdamW's.
    Returns: the optimizer; `.grad` of B holds the changed gradient after a step, which takes no closure.
    Raises: ValueError if no B trains, a scaling is 0, or a number is out of AdamW's range; nothing is frozen then.
    Source: Zhang et al., arXiv 2308.03303; name and defaults are those of Hugging Face PEFT, whose function wants r,
        lora_alpha and use_rslora, too, and whose eps is not divided by the bias correction as AdamW's is.
    """
    pairs = [adapter.pair() for adapter in adapters_in(model) if adapter.B.requires_grad and not adapter.embedding]
    if not pairs:
        raise ValueError("model must have LoRA pairs whose B trains; got none")
    for pair in pairs:
        if not pair.scaling:
            raise ValueError(f"{pair.name}: scaling must not be 0; got {pair.scaling}")
    frozen = {id(pair.A) for pair in pairs}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    optimizer = AdamW(trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for pair in pairs:  # from here on nothing is refused
        pair.A.requires_grad_(False)
        pair.A.grad = None

    def change(batch: Batch) -> dict[str, Tensor]:
        white = whiten(batch.A.mT, floor=batch.A.shape[1] * torch.finfo(batch.A.dtype).eps)
        projection = white.inverse @ white.inverse.mT / batch.scaling**2
        return {"B": batch.g_B @ projection.to(batch.g_B.dtype)}

    change_gradients(optimizer, pairs, change)
    return optimizer
