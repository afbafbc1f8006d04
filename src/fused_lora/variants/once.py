"""OncePerStep: what a variant computes from parameters alone, kept until an optimizer may have written them."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fused_lora.ops.internals import PLAIN_TENSORS, dispatch_modes_active, is_tracing, marks, transforms_active

_steps = 0  # of all optimizers, since some write past autograd's count (bitsandbytes', those that use .data)
_hooks: list[RemovableHandle] = []


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


_distributed = torch.distributed.is_initialized if torch.distributed.is_available() else lambda: False


class OncePerStep:
    """A value computed from tensors without gradients, computed again once one was written or replaced, or, if one
    of them trains, any optimizer has stepped.

    Micro-batches, recomputation under checkpointing and evaluation share one. It is computed in every call where that
    cannot be told: under torch.compile, tracing, torch.func and dispatch modes (selective checkpointing among them), in
    inference mode on tensors made there, while a CUDA graph is captured, whose replays no Python sees, and in processes
    that belong to a group, where FSDP and ZeRO fill parameters past autograd's count. What is written through
    `parameter.data` outside an optimizer, as averages of weights are, is seen on the CPU where it is the whole of a
    plain, contiguous tensor and changes its first, its last or two other words; else call `forget`. The tensors are not
    kept alive: they may be an offloaded layer's, here for one forward. Nor are there weak references to them, with
    which `torch.utils.swap_tensors`, and so Module.to over torchao's weights, refuses them. Copies and pickles start
    empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] | None = None  # the key, references to the memories, counters, the value
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_count))

    def __call__(self, compute: Callable[[], Any], *tensors: Tensor, also: Any = None) -> Any:
        """compute(), which makes no graph, or what it returned before for these tensors and an equal `also`."""
        if is_dynamo_compiling() or dispatch_modes_active() or transforms_active() or is_tracing():
            return compute()
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return compute()
        if _distributed():
            return compute()
        marked = marks(*tensors)
        if marked is None:
            return compute()
        found, memories = marked
        steps = 0
        for t in tensors:
            if t.requires_grad:  # no optimizer writes what is frozen
                steps = _steps
                break
        key, kept = (steps, also, found), self._kept
        if kept is not None and kept[0] == key and _same(found, memories, kept):
            return kept[3]
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # tensors that a later backward can save
                value, counters = compute(), _counters(tensors, found, kept)
        else:
            value, counters = compute(), _counters(tensors, found, kept)
        self._kept = key, [ref(each) for each in memories], counters, value  # at once: DataParallel's threads share it
        return value

    def forget(self) -> None:
        """Compute anew next time."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}


def _same(found: tuple, memories: list, kept: tuple) -> bool:
    """Whether tensors with equal marks are those of before: what is gone may have left its id or its address to
    another, but not both its memory and its count."""
    for (_, version, _), memory, alive, counter in zip(found, memories, kept[1], kept[2]):
        if alive() is not memory or (counter is not None and counter._version != version):
            return False
    return True


def _counters(tensors: Sequence[Tensor], found: tuple, kept: tuple | None) -> list[Tensor | None]:
    """A tensor without memory for each, which shares autograd's count of writes with it, and so goes on counting when
    another Parameter, whose count begins anew, holds the memory. None for subclasses, whose detach is their own."""
    if kept is not None:  # a new one takes 1.3 us
        before = zip(kept[0][2], kept[2], found)
        if all(was[0] == now[0] and counter is not None and counter._version == now[1] for was, counter, now in before):
            return kept[2]
    counters: list[Tensor | None] = []
    for t in tensors:
        counter = t.detach() if type(t) in PLAIN_TENSORS else None
        if counter is not None:
            counter.data = counter.new_empty(0)
        counters.append(counter)
    return counters
