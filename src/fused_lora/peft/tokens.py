"""PEFT's layer that trains rows of an embedding, without a copy of the weight."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer as PeftTrainableTokensLayer
from torch import Tensor, nn

from fused_lora.nn.trained_rows import TrainedRows, places_of, with_products, with_vectors


class TrainableTokensLayer(PeftTrainableTokensLayer):
    """PEFT's TrainableTokensLayer, which `trainable_token_indices` puts over an embedding and the head tied to it, that
    calls its base layer and replaces what that says of the tokens.

    Equivalent to: `peft.tuners.trainable_tokens.layer.TrainableTokensLayer`, which writes the rows into a copy of the
    weight in each forward and computes the gradient of all of it.
    """

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer returns with the rows of the active adapter in its weight."""
        if args or kwargs or tokens_refusal(self, active_adapters) is not None:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        base, (name,) = self.base_layer, active_adapters
        rows, delta = self.token_indices[name], self.trainable_tokens_delta[name].to(base.weight.dtype)
        y = base(x)
        if isinstance(base, nn.Embedding):
            return with_vectors(base, y, x, rows, places_of(rows, base.num_embeddings, x.device), delta)
        return with_products(y, x, torch.tensor(rows, device=x.device), delta, None)


def tokens_refusal(layer: Any, active_adapters: Sequence[str]) -> str | None:
    """Why PEFT must compute the layer with these adapters; None if it need not."""
    if layer.disable_adapters or layer.merged:
        return "its adapters are disabled or merged"
    if len(active_adapters) != 1:
        return f"it has {len(active_adapters)} active adapters"
    rows = layer.token_indices[active_adapters[0]]
    if len(set(rows)) != len(rows) or min(rows) < 0:
        return "its tokens are not different numbers >= 0"
    if getattr(layer.base_layer, "bias", None) is not None:
        return "PEFT leaves out the bias of its base layer"
    try:
        TrainedRows.check_module(layer.base_layer)
    except ValueError as error:
        return str(error)
    return None
