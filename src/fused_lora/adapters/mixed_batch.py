"""adapters_per_sample() and adapters_per_token(): many adapters of a model in one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters.holders import adapter_names as names_of
from fused_lora.adapters.holders import named_holders
from fused_lora.adapters.wrappers import unwrapped
from fused_lora.config import unknown_name
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.mixed_batch import BASE, MixedBatch, PerSample, PerToken, check_mixed, mix, unmix


@contextmanager
def adapters_per_sample(model: nn.Module, adapter_names: Sequence[str], copies: int = 1) -> Iterator[nn.Module]:
    """A context in which each sample of a batch has an adapter of its own, whichever one is active.

    Equivalent to running each sample with its adapter active, for the price of one batch: the base products are those
    of the whole batch, and each layer adds one `grouped_lora_update`. Adapters of all ranks, scalings and dropouts may
    be mixed, also modules_to_save, and DoRA of rank 1 or more without dropout on plain weights. In training every
    adapter of the batch gets its gradient that requires one (``set_adapter(model, [names])`` makes them); a backward
    that recomputes a forward (gradient checkpointing) belongs into the context. Adapters may be added and deleted
    between contexts.

    Args:
        model: a model with adapters.
        adapter_names: an adapter's name, or "__base__" for none, for each sample.
        copies: how often each sample is repeated by generation, as num_beams and num_return_sequences do.
    Raises: ValueError for an unknown adapter, naming the nearest, one that is merged, layers that can't serve a mixed
        batch (ALLoRA, `lora_bias`, LoRA-Flow, ResLoRA, convolutions, parameters), or, when a layer is called, another
        number of samples; nothing is changed then.
    Source: PEFT's `adapter_names`; Chen et al., "Punica", arXiv 2310.18547.
    """
    names = _known(model, adapter_names)
    if not names:
        raise ValueError("adapter_names must have a name for each sample; got none")
    if not isinstance(copies, int) or copies < 1:
        raise ValueError(f"copies must be an int >= 1; got {copies!r}")
    with _mixed(model, PerSample(names, copies)):
        yield model


@contextmanager
def adapters_per_token(model: nn.Module, adapter_ids: Tensor, adapter_names: Sequence[str]) -> Iterator[nn.Module]:
    """A context in which each token of a batch has an adapter of its own; see `adapters_per_sample`.

    Args:
        model: a model with adapters.
        adapter_ids: int [B, T], the place of each token's adapter in `adapter_names`, or -1 for none.
        adapter_names: names of adapters; those without a token get gradients of zero.
    Raises: ValueError as `adapters_per_sample`, or for ids out of range.
    """
    names = _known(model, adapter_names)
    if BASE in names or len(set(names)) < len(names):
        raise ValueError(f"adapter_names must be different adapters, ids of -1 are none; got {list(names)}")
    if not isinstance(adapter_ids, Tensor) or adapter_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"adapter_ids must be an int64 or int32 tensor; got {getattr(adapter_ids, 'dtype', adapter_ids)}"
        )
    if adapter_ids.numel():
        low, high = (int(end) for end in adapter_ids.aminmax())
        if low < -1 or high >= len(names):
            got = low if low < -1 else high
            raise ValueError(f"adapter_ids must be in [-1, {len(names)}), places in adapter_names; got {got}")
    with _mixed(model, PerToken(adapter_ids.long(), names)):
        yield model


def _known(model: nn.Module, adapter_names: Sequence[str]) -> tuple[str, ...]:
    """The names, which all are the model's."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise ValueError(f"adapter_names must be a list of names; got {adapter_names!r}")
    known = names_of(unwrapped(model))
    for name in adapter_names:
        if name != BASE and name not in known:
            raise unknown_name("adapter_names", name, [*known, BASE])
    return tuple(adapter_names)


@contextmanager
def _mixed(model: nn.Module, batch: MixedBatch) -> Iterator[None]:
    holders = named_holders(unwrapped(model))
    for name, holder in holders.items():
        check_mixed(name, holder, batch.distinct)
        for adapter in batch.distinct if isinstance(holder, LoRALayer) else ():
            if holder.r.get(adapter) == 0:
                raise ValueError(
                    f"{name}: a batch of several adapters excludes DoRA of rank 0; got adapter {adapter!r}"
                )
    before: list[Any] = []
    try:
        for holder in holders.values():
            before.append((holder, mix(holder, batch)))
        yield
    finally:
        for holder, state in before:
            unmix(holder, state)


def taking_names(method: Any, copies: Any) -> Any:
    """A method of a model that takes PEFT's adapter_names, too: an adapter for each sample of the batch.

    Args:
        copies: how often the method repeats each sample, from the model and the keywords.
    """

    @wraps(method)
    def call(self, *args, adapter_names=None, **kwargs):
        if adapter_names is None:
            return method(self, *args, **kwargs)
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        if recomputes and self.training and torch.is_grad_enabled():
            raise ValueError(
                "adapter_names and gradient checkpointing exclude each other, a backward would recompute the forward "
                "without them: call forward and backward in adapters_per_sample(model, adapter_names); got both"
            )
        with adapters_per_sample(self, adapter_names, copies(self, kwargs)):
            return method(self, *args, **kwargs)

    return call


def sequences(model: Any, given: dict[str, Any]) -> int:
    """How many sequences `generate` makes at once of each sample."""
    config = given.get("generation_config") or model.generation_config
    counts = [given.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences")]
    return max(count or 1 for count in counts)
