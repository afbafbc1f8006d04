"""Whether a model keeps the texts of one row apart."""

from typing import Any

import torch
from torch import Tensor

from fused_lora.rows import beginning, inputs_of, positions_of

_LENGTH = 4  # of each of two texts


def check_kept_apart(model: Any) -> None:
    """Raises ValueError naming the model if a text sees the one before it in its row: a layer without attention, or
    attention that does not end where position_ids begin anew.

    The gradient of the second text's logits by the first one's embeddings says so: it is zero to the bit where nothing
    is seen.
    """
    seen: list[Tensor] = []

    def follow(module: Any, args: Any, embedded: Tensor) -> Tensor:
        seen.append(embedded.detach().requires_grad_())
        return seen[0]

    row = torch.arange(2 * _LENGTH, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    row[:, _LENGTH] = beginning(row[:, _LENGTH])
    hook = model.get_input_embeddings().register_forward_hook(follow)
    reason = "in which a text sees the one before it"
    try:
        logits = model(input_ids=inputs_of(row), position_ids=positions_of(row), use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, _LENGTH:].float().square().sum(), seen[0])
        if not gradient[:, :_LENGTH].any():
            return
    except TypeError as error:
        reason = f"which takes none: {error}"
    finally:
        hook.remove()
    raise ValueError(
        "--packing must have a model whose attention ends where position_ids begin anew; got a "
        f"{type(model).__name__}, {reason}"
    )
