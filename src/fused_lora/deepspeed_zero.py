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


def is_absent(t: Tensor) -> bool:
    """Whether ZeRO-3 has a parameter and it is not gathered now."""
    return t.numel() == 0 and is_split(t) and t.shape != whole_shape(t)


def hooks_are_zero_s(module: Any) -> bool:
    """Whether ZeRO-3 has hooked a module, and nothing else has: they gather its parameters, as reading `_parameters`
    does in the engine's forward, for the module that runs then."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return hasattr(module, "ds_id") and all(
        (getattr(hook, "__module__", None) or "").partition(".")[0] == "deepspeed"
        for table in hooks
        for hook in table.values()
    )


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
