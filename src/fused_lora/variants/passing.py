"""What the linear layers of one block of a model share for the length of the block's forward."""

from collections.abc import Callable, Mapping
from functools import partial
from threading import get_ident
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


class _Frame(Generic[T]):
    """One forward of a block: its input, and what was made of that."""

    def __init__(self, x: Tensor):
        self.x, self.made = x, None

    made: T | None


class Passing(Generic[T]):
    """Hooks on a block that keep its input through its forward, make something of it when one of its linear layers
    asks, and let both go afterwards, come what may.

    Where the block is checkpointed, the input is that of the checkpointed function, which may lie within the hooks: so
    what is made belongs to it, and recomputing makes it anew. Every thread has its own.
    """

    def __init__(self) -> None:
        self._frames: dict[int, list[_Frame[T]]] = {}  # by thread, the innermost last
        self._hooks: list[RemovableHandle] = []

    def watch(self, block: nn.Module) -> None:
        """Put the hooks on a block."""
        self._hooks = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave, always_call=True),
        ]

    def unwatch(self, block: nn.Module) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        inside = getattr(block, _CHECKPOINTING, None)
        if isinstance(inside, _Inside):
            setattr(block, _CHECKPOINTING, inside.checkpoint)

    def made_of(self, x: Tensor) -> T:
        """What the block's layers get, of the block's first tensor."""
        raise NotImplementedError

    def handed_on(self, made: T, output: Any) -> None:
        """Called with what was made and what the block returned, unless it failed."""

    def made(self, who: str) -> T:
        """What the layers get in this forward of the block. Raises: ValueError outside it."""
        frames = self._frames.get(_thread())
        if not frames:
            raise ValueError(
                f"{who} needs its layers to be called by their block, and checkpointed with the whole block or not at "
                "all; got a call outside the block's forward"
            )
        return self._made(frames[-1])

    def _made(self, frame: _Frame[T]) -> T:
        if frame.made is None:
            frame.made = self.made_of(frame.x)
        return frame.made

    def around(self, forward: Callable, *args: Any) -> Any:
        """forward(*args), a block's, as if it were called with the hooks."""
        self._start(args, getattr(forward, "keywords", {}))
        output = None
        try:
            output = forward(*args)
        finally:
            frame = self._finish(output)
        outer = self._frames.get(_thread())
        if outer:
            outer[-1].made = frame.made
        return output

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        checkpoint = getattr(block, _CHECKPOINTING, None)
        if checkpoint is not None and not isinstance(checkpoint, _Inside):
            setattr(block, _CHECKPOINTING, _Inside(self, checkpoint))
        self._start(args, kwargs)

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        if self._frames.get(_thread()):  # none where `_enter`, or a hook before it, has raised
            self._finish(output)

    def _start(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        given = (*args, kwargs.get("hidden_states"), *kwargs.values())
        x = next((t for t in given if isinstance(t, Tensor)), None)
        if x is None:
            raise ValueError(f"a linked block must be given a tensor; got {len(args)} arguments without one")
        self._frames.setdefault(_thread(), []).append(_Frame(x))

    def _finish(self, output: Any) -> _Frame[T]:
        frames = self._frames[_thread()]
        frame = frames.pop()
        if not frames:
            del self._frames[_thread()]
        if output is not None:
            self.handed_on(self._made(frame), output)
        return frame


_CHECKPOINTING = "_gradient_checkpointing_func"  # with which transformers' blocks checkpoint their forward, hooks aside


class _Inside:
    """A block's checkpointing function, with the block's forward as `Passing.around` runs it."""

    def __init__(self, passing: Passing, checkpoint: Callable):
        self._passing, self.checkpoint = passing, checkpoint

    def __call__(self, forward: Callable, *args: Any) -> Any:
        around = partial(self._passing.around, forward)
        return self.checkpoint(around, *args)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()


def version(t: Tensor) -> int:
    """How often a tensor was written to; nobody counts for inference tensors, nor while torch.compile traces."""
    return 0 if torch.compiler.is_compiling() or t.is_inference() else t._version


def check_acting(layer: Any, acting: str | list[str], who: str) -> None:
    """Raises ValueError if other adapters act in a layer than those that a link was made for."""
    if layer.active_adapter != acting:
        raise ValueError(
            f"{who} acts instead of adapter {acting!r}, and set_adapter excludes it: remove() it first; got adapter "
            f"{layer.active_adapter!r} active"
        )
