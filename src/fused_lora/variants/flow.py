"""LoRA-Flow: several frozen adapters, weighted anew for every token by a gate in each block of the model.

    w = softmax(x W_gate.T / T) + b        [..., k], x the block's input
    y = x Wt + sum over j of w_j s_j (x A_jt) B_jt

The adapters' ranks lie behind one another in one A [R, K] and one B [N, R], so w is the op's `gate`. With the same
weights for every token they are part of B, and the call is plain LoRA.
Source: Wang et al., arXiv 2402.11455; the bias's start w0 - 1/k after github.com/thunlp/LoRAFlow.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.ops.update import joined
from fused_lora.variants import Update
from fused_lora.variants.once import OncePerStep
from fused_lora.variants.passing import Passing, check_acting

Blocks = tuple[tuple[int, int], ...]  # which adapter, and its rank, one after the other


class FlowGate(nn.Module):
    """The weights of k adapters for each token.

    Equivalent to ``softmax(F.linear(x, weight) / temperature, dim=-1) + bias``, the product in x's dtype and the rest
    in fp32 at least. `weight` [k, d] starts at zero and `bias` [k] so that the weights are the wanted ones.

    Args:
        size: d, the width of x.
        init_weights: the adapters' weights at the start.
        temperature: T.
        device, dtype: of weight and bias.
    """

    def __init__(self, size: int, init_weights: Sequence[float], temperature: float, device=None, dtype=None):
        super().__init__()
        start = torch.tensor(init_weights, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.zeros(len(start), size, device=device, dtype=dtype))
        self.bias = nn.Parameter(start - 1 / len(start))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """w [..., k] of x [..., d]."""
        logits = F.linear(x, self.weight.to(x.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.softmax(logits / self.temperature, dim=-1) + self.bias

    def extra_repr(self) -> str:
        return f"adapters={len(self.bias)}, temperature={self.temperature}"


class Weights:
    """A block's w [..., k], and the forms of it that the block's layers need, each made once."""

    def __init__(self, w: Tensor):
        self.w = w
        self._by_blocks: dict[Blocks, Tensor] = {}

    def gate(self, blocks: Blocks) -> Tensor:
        """The op's gate for these adapters: [..., number of adapters] if all have one rank, else [..., R]."""
        if blocks not in self._by_blocks:
            same = len({rank for _, rank in blocks}) == 1
            if same and [j for j, _ in blocks] == list(range(self.w.shape[-1])):
                return self.w
            lead = self.w.shape[:-1]
            columns = [self.w[..., j : j + 1].expand(*lead, 1 if same else rank) for j, rank in blocks]
            self._by_blocks[blocks] = torch.cat(columns, dim=-1)
        return self._by_blocks[blocks]


class BlockWeights(Passing[Weights]):
    """Hooks that compute w from the input of a block, for its layers."""

    def __init__(self, gate: FlowGate):
        super().__init__()
        self._gate = gate

    def made_of(self, x: Tensor) -> Weights:
        return Weights(self._gate(x))


class Flow:
    """The link of one layer: its adapters as one, weighted by its block's gate, or by numbers.

    Args:
        layer: the LoRALinear, in which the adapters act.
        adapters: all adapters of the flow; the layer need not hold each.
        weights: gives w; or a number for each adapter.
    """

    def __init__(self, layer: Any, adapters: Sequence[str], weights: BlockWeights | Sequence[float]):
        held = [(j, name) for j, name in enumerate(adapters) if name in layer.lora_A]
        self._names = [name for _, name in held]
        self._blocks: Blocks = tuple((j, layer.r[name]) for j, name in held)
        self._acting = layer.active_adapter
        self._weights = weights
        self._joined = OncePerStep()

    def __str__(self) -> str:
        return f"LoRA-Flow over adapters {self._names}"

    def update(self, layer: Any, x: Tensor) -> Update:
        """The adapters' update without dropout: they are frozen, and only the gate trains."""
        check_acting(layer, self._acting, str(self))
        lora_A, lora_B = self._factors(layer)
        if not isinstance(self._weights, BlockWeights):
            return Update(lora_A, lora_B, 1.0, 0.0, {})
        gate = self._weights.made(str(self)).gate(self._blocks)
        if gate.shape[:-1] != x.shape[:-1]:
            if x.dim() != 2 or len(x) != gate[..., 0].numel():
                raise ValueError(
                    f"{self} needs the tokens of the block's input, {list(gate.shape[:-1])}, in each of its layers; "
                    f"got x of shape {list(x.shape)}"
                )
            gate = gate.reshape(len(x), -1)
        return Update(lora_A, lora_B, 1.0, 0.0, {"gate": gate})

    def acts_with(self, active: str | list[str] | None) -> bool:
        """Never: its adapters are frozen."""
        return False

    def merged_updates(self, layer: Any) -> list[tuple[Tensor, Tensor, float]]:
        """Raises ValueError: weights that depend on the token are no part of a matrix. Without a gate the adapters with
        their weights."""
        if isinstance(self._weights, BlockWeights):
            raise ValueError(
                f"merging and {self} exclude each other, its weights depend on the token: remove() it first"
            )
        check_acting(layer, self._acting, str(self))
        weights = [self._weights[j] for j, _ in self._blocks]
        return [(*layer._factors(name), float(layer.scaling[name]) * w) for name, w in zip(self._names, weights)]

    def _factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """The adapters' A and scaled B as one each, made again only where one of them may have changed."""
        lora_As, lora_Bs = zip(*(layer.factors(name) for name in self._names))
        scalings = tuple(layer.scaling[name] for name in self._names)
        if not isinstance(self._weights, BlockWeights):
            scalings = tuple(s * self._weights[j] for s, (j, _) in zip(scalings, self._blocks))
        given = (*lora_As, *lora_Bs, *(s for s in scalings if isinstance(s, Tensor)))
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            return joined(lora_As, lora_Bs, scalings)
        numbers = [s for s in scalings if not isinstance(s, Tensor)]
        return self._joined(lambda: joined(lora_As, lora_Bs, scalings), *given, also=numbers)
