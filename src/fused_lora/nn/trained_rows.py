"""TrainedRows: an embedding, or the output head tied to it, some of whose rows are an adapter's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.nn.layer import adapter_place
from fused_lora.nn.merged_weight import check_values

ROWS_KEY = "token_adapter.trainable_tokens_delta"  # of the values in PEFT's file and in the state dict


def with_vectors(embedding: Any, y: Tensor, tokens: Tensor, rows: list[int], places: Tensor, delta: Tensor) -> Tensor:
    """What an embedding returns, y [..., D] of tokens [...], with the vectors of some tokens replaced.

    Args:
        rows: the numbers of these tokens.
        places: [V], where each token is in them, or -1.
        delta: [n, D], their vectors, in the weight's dtype.
    """
    found, padding = places[tokens], embedding.padding_idx
    own = F.embedding(found.clamp(min=0), delta, rows.index(padding) if padding in rows else None)
    scale = getattr(embedding, "embed_scale", 1.0)
    own = own * (scale.to(own.dtype) if isinstance(scale, Tensor) else scale)
    return torch.where((found >= 0).unsqueeze(-1), own.to(y.dtype), y)


def with_products(y: Tensor, x: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear layer returns, y [..., V] of x [..., D], with the products of the rows index [n] replaced, which
    are delta [n, D]."""
    own = F.linear(x, delta, None if bias is None else bias[index])
    return y.index_copy(-1, index, own.to(y.dtype))


def places_of(rows: Sequence[int], size: int, device: torch.device) -> Tensor:
    """[size]: where each number is in the rows, or -1."""
    index, order = torch.tensor(rows, device=device), torch.arange(len(rows), device=device)
    return torch.full((size,), -1, device=device).index_copy(0, index, order)


class TrainedRows(nn.Module):
    """What a `ModuleToSave` calls in the place of its original, where an adapter trains rows of the weight [V, D] alone
    (PEFT's `trainable_token_indices`).

    Equivalent to the module with the weight ``weight.index_copy(0, rows, trainable_tokens_delta)``, of which neither a
    copy is made nor a gradient computed: the module runs as it is, and the rows replace what it says of them.

    Args:
        module: an nn.Embedding or a linear layer; it stays the original's and is no part of this one.
        rows: the numbers of the rows, n of them; their values start as those of the module.
        tied_to: of another module with the same weight; its values are used, and this one has none of its own.
    """

    def __init__(self, module: nn.Module, rows: Sequence[int], tied_to: "TrainedRows | None" = None):
        super().__init__()
        self._outside = (module, tied_to)  # a tuple, so that neither is a submodule
        self.rows = list(rows)
        self._aside: list[nn.Parameter] = []  # the module's weight while a folded one stands in its place
        self._folded: list[nn.Parameter] = []  # that one, for all modules that are tied to this
        weight: Any = module.weight
        if tied_to is None:
            values = weight.detach()[self.rows].to(adapter_place(module)[1])
            self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": nn.Parameter(values, requires_grad=False)})
        embeds = isinstance(module, nn.Embedding)
        index = torch.tensor(self.rows, device=weight.device)
        index = places_of(self.rows, len(weight), weight.device) if embeds else index
        self.register_buffer("index", index, persistent=False)
        self.training = module.training

    @staticmethod
    def check_module(module: nn.Module) -> None:
        """Raises ValueError unless rows of a module can be trained."""
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding):
            own = type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale")
            options = module.max_norm is not None, module.scale_grad_by_freq, module.sparse
            if own or any(options):
                raise ValueError(
                    "an embedding must have a forward of nn.Embedding or a scaled one, without max_norm, "
                    f"scale_grad_by_freq and sparse, for rows of it to be trained; got {module}"
                )
        elif not isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(f"a module must be an nn.Embedding or nn.Linear; got a {type(module).__name__}")

    @property
    def module(self) -> Any:
        """The module of which the rows are."""
        return self._outside[0]

    @property
    def is_tied(self) -> bool:
        """Whether another module's TrainedRows have the values."""
        return self._outside[1] is not None

    def _source(self) -> "TrainedRows":
        return self._outside[1] or self

    def delta(self) -> Tensor:
        """The rows [n, D], in the dtype of the module's weight."""
        return self._source().token_adapter["trainable_tokens_delta"].to(self.module.weight.dtype)

    def forward(self, x: Tensor, *args, **kwargs):
        """What the module returns with the rows in its weight."""
        y = self.module(x, *args, **kwargs)
        if self._aside:
            return y
        if isinstance(self.module, nn.Embedding):
            return with_vectors(self.module, y, x, self.rows, self.index, self.delta())
        return with_products(y, x, self.index, self.delta(), self.module.bias)

    @property
    def weight(self) -> Tensor:
        """The weight with the rows in it, for code that reads it instead of calling the module."""
        if self._aside:
            return self.module.weight
        rows = torch.tensor(self.rows, device=self.module.weight.device)
        return self.module.weight.index_copy(0, rows, self.delta())

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_outside" not in vars(self) or name.startswith("_"):
                raise
            return getattr(self.module, name)

    def check_mergeable(self) -> None:
        """Raises ValueError unless `fold` can put finite rows into a weight that is here."""
        check_values("weight", self.module.weight)
        check_values("trainable_tokens_delta", self._source().token_adapter["trainable_tokens_delta"])
        if not torch.isfinite(self.delta()).all():
            raise ValueError("trainable_tokens_delta must be finite to be merged; got other values")

    @torch.no_grad()
    def fold(self) -> None:
        """Put the rows into the module's weight: into a new Parameter, one for all that are tied."""
        source = self._source()
        if not source._folded:
            source._folded.append(nn.Parameter(self.weight.detach(), requires_grad=False))
        self._aside.append(self.module.weight)
        self.module.weight = source._folded[0]

    def unfold(self) -> None:
        """Put the weight back that `fold` set aside, if it did."""
        if self._aside:
            self.module.weight = self._aside.pop()
        self._source()._folded.clear()

    def _apply(self, fn, recurse=True):
        """Module.to(), .half() and the like reach what is kept aside, too."""
        super()._apply(fn, recurse)
        aside = nn.ParameterList(self._aside)._apply(fn)
        self._aside[:] = aside
        return self

    def extra_repr(self) -> str:
        rows = f"{self.rows[:3]}"[:-1] + (", …]" if len(self.rows) > 3 else "]")
        return f"rows={rows}, tied={self.is_tied}"
