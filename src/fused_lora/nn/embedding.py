"""LoRAEmbedding: an embedding with LoRA adapters by name."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.nn.layer import LoRALayer


class LoRAEmbedding(LoRALayer):
    """A frozen nn.Embedding, kept as `base_layer`, with LoRA adapters by name.

    Equivalent to, with V tokens, vectors of D elements, the active adapter's A [R, V], B [D, R] and scaling::

        y = base_layer(tokens) + embed_scale * scaling * F.linear(F.embedding(tokens, A.t(), ...), B)

    with the base's padding_idx, max_norm, norm_type, scale_grad_by_freq and sparse, and the embed_scale by which
    embeddings of transformers multiply their vectors. A starts as zeros, B as normal noise. There is no dropout on
    tokens. An output head with the same weight keeps it without the update.

    Source: PEFT's layer for embeddings.
    """

    file_keys = ("lora_embedding_A", "lora_embedding_B")

    @staticmethod
    def check_base(base: Any) -> None:
        """Raises ValueError unless it is an nn.Embedding."""
        if not isinstance(base, nn.Embedding):
            raise ValueError(f"embedding must be a torch.nn.Embedding; got {type(base).__qualname__}")

    @staticmethod
    def shapes_over(base: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A [R, V] and B [D, R]."""
        return (r, base.num_embeddings), (base.embedding_dim, r)

    def reset_lora_parameters(self, adapter_name: str) -> None:
        """Start an adapter afresh: A zero, B normal. Raises: ValueError if it is unknown or merged."""
        self._check_resettable(adapter_name)
        nn.init.zeros_(self.lora_A[adapter_name])
        nn.init.normal_(self.lora_B[adapter_name])

    def forward(self, tokens: Tensor, *args, **kwargs):
        """What the base returns, [..., D], with the updates of tokens [...] added to it."""
        base: Any = self.base_layer
        y = base(tokens, *args, **kwargs)
        if self.active_adapter is None or self.merged:
            return y
        result = y
        factor = getattr(base, "embed_scale", 1.0)
        options = base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
        for lora_A, lora_B, scaling, _ in self._acting():
            low = F.embedding(tokens.to(lora_A.device), lora_A.t(), base.padding_idx, *options)
            result = result + F.linear(low, lora_B) * scaling * factor
        return result.to(y.dtype)

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        if self.base_layer.max_norm is not None:
            raise ValueError("max_norm must be None for a merge, a sum of vectors has another norm; got a number")
        return self.lora_A[adapter_name].t(), self.lora_B[adapter_name].t()

    def extra_repr(self) -> str:
        return self._adapters_repr()
