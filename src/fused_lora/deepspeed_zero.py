"""Parameters that DeepSpeed's ZeRO has. Its optimizer steps copies of them, pieces of one long vector, and writes these
back. ZeRO-3 splits the parameters too, over the processes, as a model is loaded or in deepspeed.initialize: a tensor
without elements stands in each one's place but while a module that has it runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def is_split(t: Tensor) -> bool:
    """Whether ZeRO-3 has a parameter."""
    return hasattr(t, "ds_id")


def is_copied(t: Tensor) -> bool:
    """Whether ZeRO-1 or ZeRO-2 steps a copy of a parameter: what is written into it is lost in the next step."""
    return hasattr(t, "_hp_mapping")


def whole_shape(t: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, of a split one when it is whole."""
    return tuple(getattr(t, "ds_shape", t.shape))


@contextmanager
def gathered(tensors: Iterable[Any]) -> Iterator[None]:
    """Inside, those of the tensors that are split are whole, for reading. Every process must come here."""
    split = [t for t in tensors if is_split(t)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield
