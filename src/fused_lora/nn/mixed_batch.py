"""Many adapters in one batch: which rows of a layer's input are whose, and the layers' forwards on that.

While a batch is mixed, a layer is of a subclass of its own class that reads `mixed` instead of the active adapter; so
its usual forward has no question to ask.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.nn.around import LoRALinearAround
from fused_lora.nn.embedding import LoRAEmbedding
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.modules_to_save import ModuleToSave
from fused_lora.ops.grouped import grouped_lora_update
from fused_lora.ops.grouped_linear import grouped_lora_linear
from fused_lora.ops.remembered import remembered
from fused_lora.variants.dora import DoRA

BASE = "__base__"  # the name of no adapter, as in PEFT


class Segments(NamedTuple):
    """The rows of each adapter, as `grouped_lora_update` takes them, for an input of M rows."""

    names: tuple[str, ...]
    offsets: Tensor  # [G + 1]
    rows: Tensor | None  # [M'], None where all rows lie in the order of the names

    def all_rows(self, M: int) -> Tensor:
        """`rows` where it is None, too."""
        return torch.arange(M, device=self.offsets.device) if self.rows is None else self.rows

    def groups(self, M: int) -> Tensor:
        """For each of M rows 1 + the place of its adapter in `names`, 0 for none: [M]."""
        counts = self.offsets.diff()
        places = torch.arange(1, len(counts) + 1, device=counts.device).repeat_interleave(counts)
        return places.new_zeros(M).index_copy_(0, self.all_rows(M).long(), places)


@remembered
def segments_of_samples(names: tuple[str, ...], tokens: int, device: torch.device) -> Segments:
    """The segments of samples of so many rows each, one after the other, by the adapter of each; BASE is none.

    Remembered, so all layers of a model, and the steps of a generation, share them.
    """
    distinct = tuple(dict.fromkeys(name for name in names if name != BASE))
    places = [[i for i, own in enumerate(names) if own == name] for name in distinct]
    order = [i for own in places for i in own]
    ends = torch.tensor([0, *(len(own) * tokens for own in places)], device=device).cumsum(0)
    if order == list(range(len(names))):
        return Segments(distinct, ends, None)
    starts = torch.tensor(order, dtype=torch.int64, device=device)[:, None] * tokens
    return Segments(distinct, ends, (starts + torch.arange(tokens, device=device)).flatten())


class PerSample:
    """One adapter for each sample.

    Args:
        names: an adapter's name, or BASE, for each sample.
        copies: how often generation repeats each sample: its beams, or the sequences that it returns.
    """

    def __init__(self, names: tuple[str, ...], copies: int = 1):
        self.names, self.distinct = names, tuple(dict.fromkeys(name for name in names if name != BASE))
        self._repeated, self._all = tuple(name for name in names for _ in range(copies)), frozenset(self.distinct)

    def samples(self, x: Tensor) -> tuple[str, ...]:
        """The name for each of x's samples. Raises: ValueError if x has another number of samples."""
        for names in (self.names, self._repeated):
            if x.dim() > 1 and x.shape[0] == len(names):
                return names
        raise ValueError(
            f"adapter_names must have one name for each of the {x.shape[0] if x.dim() else 1} samples of an input "
            f"{list(x.shape)}; got {len(self.names)}"
        )

    def segments(self, held: Any, x: Tensor, features: int = 1) -> Segments:
        """The rows of x, [B, ..., K], of the adapters that a layer holds; so many trailing dimensions are features."""
        own = self.samples(x)
        if not held.keys() >= self._all:
            own = tuple(name if name in held else BASE for name in own)
        rows = x.shape[: x.dim() - features].numel()
        return segments_of_samples(own, rows // max(len(own), 1), x.device)


class PerToken:
    """One adapter for each token.

    Args:
        ids: int [B, T], the place of a token's adapter in `names`, -1 for none.
        names: adapters' names.
    """

    def __init__(self, ids: Tensor, names: tuple[str, ...]):
        self.ids, self.distinct = ids, names
        self._found: dict[Any, Segments] = {}

    def segments(self, held: Any, x: Tensor, features: int = 1) -> Segments:
        """As that of `PerSample`, for x [B, T, K] or [B * T, K]; adapters without a token are in it, too."""
        if x.shape[: x.dim() - features] not in (self.ids.shape, self.ids.flatten().shape):
            raise ValueError(
                f"adapter_ids must have the leading dimensions of an input {list(x.shape)}; got {list(self.ids.shape)}"
            )
        own = tuple(name for name in self.distinct if name in held)
        if (own, x.device) not in self._found:
            with torch.inference_mode(False):
                self._found[own, x.device] = self._sorted(own, x.device)
        return self._found[own, x.device]

    def _sorted(self, own: tuple[str, ...], device: torch.device) -> Segments:
        place = [own.index(name) if name in own else -1 for name in self.distinct]
        ids = torch.tensor([*place, -1], device=device)[self.ids.to(device).flatten()]  # -1 takes the last
        order = ids.argsort(stable=True)
        counts = torch.bincount(ids + 1, minlength=len(own) + 1)
        ends = counts.cumsum(0) - counts[0]
        return Segments(own, ends, order[int(counts[0]) :])


MixedBatch = PerSample | PerToken


class Mixed:
    """What stands before a layer's class while its batch is mixed."""

    mixed: MixedBatch
    plain_class: type

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raises ValueError for any: the rows of other adapters would get it, too."""
        if adapter_names:
            raise ValueError(
                f"merging and a batch of several adapters exclude each other; got {adapter_names} to merge in a batch "
                f"of {list(self.mixed.distinct)}"
            )


class MixedLinear(Mixed, LoRALinear):
    """The forward of a LoRALinear of any kind: the base product, and one update by groups of rows."""

    def forward(self, x: Tensor, *args, **kwargs):
        """y [..., N] of x [..., K]."""
        found = self.mixed.segments(self.lora_A, x)
        if isinstance(self, LoRALinearAround):
            return self._mixed_update(self.base_layer(x, *args, **kwargs), x, found)
        if not self.variants or not any(name in self.variants for name in found.names):
            return self._mixed_linear(x, found) if found.names else self._plain(x)
        # DoRA: each row by its adapter's out_scale, rows of other adapters by 1
        y = self._mixed_update(F.linear(x, self.matrix()), x, found)
        own = [self._out_scale(name) for name in found.names]
        scales = torch.stack([torch.ones_like(own[0]), *own])
        rows = x.numel() // max(x.shape[-1], 1)
        y = (y * scales[found.groups(rows)].view(y.shape)).to(y.dtype)
        return y if self.bias is None else y + self.bias

    def _mixed_update(self, y: Tensor, x: Tensor, found: Segments) -> Tensor:
        if not found.names:
            return y
        lora_A, lora_B, scaling, dropout_p = self._adapters(found)
        return grouped_lora_update(y, x, lora_A, lora_B, scaling, found.offsets, rows=found.rows, dropout_p=dropout_p)

    def _mixed_linear(self, x: Tensor, found: Segments) -> Tensor:
        lora_A, lora_B, scaling, dropout_p = self._adapters(found)
        factors = self.matrix(), self.bias, lora_A, lora_B
        return grouped_lora_linear(x, *factors, scaling, found.offsets, found.rows, dropout_p)

    def _adapters(self, found: Segments) -> tuple[list[Tensor], list[Tensor], list[float], list[float]]:
        """A, B, scaling and dropout of each adapter of a batch, the factors in one dtype."""
        modules: Any = self._modules  # past Module.__getattr__
        names, held_A, held_B = found.names, modules["lora_A"], modules["lora_B"]
        lora_A, lora_B = [held_A[name] for name in names], [held_B[name] for name in names]
        if any(A.is_meta or A.shape[0] == 0 for A in lora_A):
            lora_A, lora_B = map(list, zip(*map(self.factors, names)))
        if len({t.dtype for t in (*lora_A, *lora_B)}) > 1:
            lora_A, lora_B = [A.float() for A in lora_A], [B.float() for B in lora_B]
        numbers, rates = self.scaling, [self.acting_dropout(name) for name in names]
        return lora_A, lora_B, [float(numbers[name]) for name in names], rates

    def _out_scale(self, name: str) -> Tensor:
        variant = self.variants.get(name)
        if isinstance(variant, DoRA):
            return variant.scale(self, *self.factors(name))
        return torch.ones(self.out_features, device=self.lora_B[name].device)


class MixedEmbedding(Mixed, LoRAEmbedding):
    """The forward of a LoRAEmbedding, an adapter after the other."""

    def forward(self, tokens: Tensor, *args, **kwargs):
        """[..., D] of tokens [...]."""
        base: Any = self.base_layer
        y = base(tokens, *args, **kwargs)
        found, flat = self.mixed.segments(self.lora_A, tokens, features=0), tokens.flatten()
        options = base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
        out, all_rows = y.reshape(-1, y.shape[-1]), found.all_rows(flat.shape[0])
        for name, rows in zip(found.names, all_rows.split(found.offsets.diff().tolist())):
            lora_A, lora_B = self.factors(name)
            low = F.embedding(flat[rows], lora_A.t(), base.padding_idx, *options)
            factor = self.scaling[name] * getattr(base, "embed_scale", 1.0)
            out = out.index_add(0, rows, (F.linear(low, lora_B) * factor).to(y.dtype))
        return out.view(y.shape)


class MixedModuleToSave(Mixed, ModuleToSave):
    """The forward of a module of which adapters have copies: each copy on its own samples, or tokens, and the original
    on the others."""

    def forward(self, x: Tensor, *args, **kwargs):
        features = 0 if isinstance(self.original_module, nn.Embedding) else 1
        found = self.mixed.segments(self.modules_to_save, x, features)
        flat = x.reshape(-1, *x.shape[x.dim() - features :])
        groups = found.groups(flat.shape[0])
        parts = [(groups == place).nonzero()[:, 0] for place in range(len(found.names) + 1)]
        modules = [self.original_module, *(self.modules_to_save[name] for name in found.names)]
        results = [module(flat[rows], *args, **kwargs) for module, rows in zip(modules, parts)]
        back = torch.cat(parts).argsort()
        return torch.cat(results)[back].view(*x.shape[: x.dim() - features], -1)


@cache
def _mixed_class(plain: type) -> type:
    kinds = {LoRALinear: MixedLinear, LoRAEmbedding: MixedEmbedding, ModuleToSave: MixedModuleToSave}
    mixed = next(kinds[kind] for kind in kinds if issubclass(plain, kind))
    return type(plain.__name__, (mixed, plain), {"__module__": plain.__module__, "plain_class": plain})


def check_mixed(name: str, layer: LoRALayer | ModuleToSave, names: tuple[str, ...]) -> None:
    """Raises ValueError unless the layer, called `name`, can serve these adapters in one batch."""
    if layer.merged:
        raise ValueError(
            f"{name} must be unmerged for several adapters in a batch; got {layer.active_adapter!r} merged"
        )
    if isinstance(layer, ModuleToSave):
        held = any(adapter in layer.modules_to_save for adapter in names)
        if held and not isinstance(layer.original_module, nn.Linear | nn.Embedding):
            raise ValueError(
                f"{name} must be an nn.Linear or nn.Embedding where adapters in one batch have copies of it; got a "
                f"{type(layer.original_module).__name__}"
            )
        return
    if layer.link is not None:
        raise ValueError(f"{name} must not be linked for several adapters in a batch; got {type(layer.link).__name__}")
    own = [adapter for adapter in names if adapter in layer.lora_A]
    if own and not isinstance(layer, LoRALinear | LoRAEmbedding):
        kind = type(layer).__name__
        raise ValueError(f"{name} must be a linear layer or an embedding for several adapters in a batch; got a {kind}")
    for adapter in own:
        variant = layer.variants.get(adapter)
        if variant is None:
            continue
        kind = type(variant).__name__
        if not isinstance(variant, DoRA) or isinstance(layer, LoRALinearAround):
            raise ValueError(f"{name}: a batch of several adapters excludes {kind} here; got adapter {adapter!r}")
        if layer.acting_dropout(adapter) > 0.0:
            raise ValueError(f"{name}: a batch of several adapters excludes DoRA with dropout; got adapter {adapter!r}")


def mix(layer: LoRALayer | ModuleToSave, batch: MixedBatch) -> tuple[Any, ...]:
    """Let a layer serve a batch. Returns: what `unmix` puts back."""
    before = type(layer), vars(layer).get("mixed"), layer.active_adapter
    plain: Any = getattr(layer, "plain_class", type(layer)) if isinstance(layer, Mixed) else type(layer)
    own: Any = layer.modules_to_save if isinstance(layer, ModuleToSave) else layer.lora_A
    if any(name in own for name in batch.distinct):
        vars(layer)["mixed"] = batch
        layer.__class__ = _mixed_class(plain)
    else:
        layer.__class__, layer.active_adapter = plain, None
    return before


def unmix(layer: LoRALayer | ModuleToSave, before: tuple[Any, ...]) -> None:
    """Undo `mix`."""
    layer.__class__, batch, layer.active_adapter = before
    vars(layer).pop("mixed", None)
    if batch is not None:
        vars(layer)["mixed"] = batch
