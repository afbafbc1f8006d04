"""ResLoRA: a layer's low-rank path takes a shortcut from the layers of the same name in the blocks before it.

    input   y_n = W x_n + s B_n A_n (x_n + x_{n-1})                       x_0 := x_1
    block   y_n = W x_n + s (B_n A_n + ... + B_{n-m} A_{n-m}) x_n
    middle  y_n = W x_n + s B_n (A_n x_n + ... + A_{n-m} x_{n-m})         each A x is a layer's own

with s of layer n. The op's `x_lora`; one A and B of rank (m + 1) R; `h_in` and `return_h`.
What a layer hands to the next block travels as an attribute of the block's output, so it belongs to one forward, is an
input of the next block where that is checkpointed, and goes when the tensor goes.
Source: Shi et al., arXiv 2402.18039.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.variants import Update
from fused_lora.variants.passing import Passing, check_acting, version

Matrix = tuple[Tensor, Tensor, float]  # left, right and scaling of what is added to a base weight
_CARRIED = "_fused_lora_carried"


class Carried(NamedTuple):
    """What a layer hands on."""

    tensors: tuple[Tensor, ...]  # its x; or the h of the layers before, the newest first
    version: int  # of x, when it was handed on


class Estimate(NamedTuple):
    """A lossy merge's guess of what the layers before would hand on, for each of them, the nearest first."""

    factors: list[float]
    of_matrices: bool  # A x of a layer before is factor * (its A) x, not factor * (this A) x


class _Held:
    """What one forward of a block has from the blocks before, by the layer's path, and what its own layers hand on."""

    def __init__(self, before: dict[str, Carried]):
        self.before = before
        self.own: dict[str, Carried] = {}
        self.sums: dict[tuple, tuple[Tensor, ...]] = {}  # x + x_prev and both, for layers of the same input


class Carrying(Passing[_Held]):
    """Hooks that take what the blocks before have handed on from the block's input, and put it on its output.

    Args:
        first, last: whether no block comes before, or after.
        paths: of the block's linked layers. What an earlier block's layer of such a path has handed on goes no further.
    """

    def __init__(self, first: bool, last: bool, paths: Collection[str]):
        super().__init__()
        self._first, self._last, self._paths = first, last, frozenset(paths)

    def made_of(self, x: Tensor) -> _Held:
        carried = {} if self._first else getattr(x, _CARRIED, None)
        if carried is None:
            raise ValueError(
                "ResLoRA's input and middle shortcuts need each block to be given the very tensor that the block "
                "before has returned, and exclude use_reentrant=True where blocks are checkpointed; got another tensor"
            )
        return _Held(carried)

    def handed_on(self, made: _Held, output: Any) -> None:
        if not self._last:
            further = {path: carried for path, carried in made.before.items() if path not in self._paths}
            setattr(output if isinstance(output, Tensor) else output[0], _CARRIED, further | made.own)


class Shortcut:
    """The link of one layer.

    Args:
        layer: the LoRALinear.
        before: the layers that it takes the shortcut from, the nearest first.
    """

    kind = ""

    def __init__(self, layer: Any, before: Sequence[Any]):
        self._acting = layer.active_adapter
        self.before = list(before)
        self.estimate: Estimate | None = None  # while a lossy merge goes on

    def __str__(self) -> str:
        return f"ResLoRA's {self.kind} shortcut"

    def update(self, layer: Any, x: Tensor) -> Update:
        """The layer's update with the shortcut."""
        check_acting(layer, self._acting, str(self))
        dropout_p = layer.acting_dropout(self._acting)
        lora_A, lora_B = layer.lora_A[self._acting], layer.lora_B[self._acting]
        return self._extended(Update(lora_A, lora_B, layer.scaling[self._acting], dropout_p, {}), x)

    def acts_with(self, active: str | list[str] | None) -> bool:
        """With the adapter that it was made for."""
        return active == self._acting

    def _extended(self, own: Update, x: Tensor) -> Update:
        """The layer's own update, with the shortcut."""
        raise NotImplementedError

    def merged_updates(self, layer: Any) -> list[Matrix]:
        """What the layer adds to its weight. Raises: ValueError unless that is exact or there is an estimate."""
        check_acting(layer, self._acting, str(self))
        if self.estimate is None:
            raise ValueError(
                f"merging exactly and {self} exclude each other: merge(mode='input') and merge(mode='weights') of what "
                "link_reslora has returned are lossy, its remove() drops the shortcut"
            )
        (left, right), (factors, of_matrices) = layer._factors(self._acting), self.estimate
        scaling = float(layer.scaling[self._acting])
        if not of_matrices:
            return [(left, right, (1 + sum(factors)) * scaling)]
        updates = [(left, right, scaling)]
        for factor, before in zip(factors, self.before, strict=True):
            its_left, its_right = before._factors(self._acting)
            pair = (its_left, right) if layer.fan_in_fan_out else (left, its_right)  # B of this layer, A of that one
            updates.append((*pair, factor * scaling))
        return updates


class BlockShortcut(Shortcut):
    """One A and one B of this layer's and the layers' before it."""

    kind = "block"

    def _extended(self, own: Update, x: Tensor) -> Update:
        if not self.before:
            return own
        lora_As = [layer.lora_A[self._acting] for layer in self.before]
        lora_Bs = [layer.lora_B[self._acting] for layer in self.before]
        return own._replace(lora_A=torch.cat([own.lora_A, *lora_As]), lora_B=torch.cat([own.lora_B, *lora_Bs], dim=1))

    def merged_updates(self, layer: Any) -> list[Matrix]:
        """Exact."""
        check_acting(layer, self._acting, str(self))
        scaling = float(layer.scaling[self._acting])
        return [(*each._factors(self._acting), scaling) for each in (layer, *self.before)]


class _CarryingShortcut(Shortcut):
    """One that needs tensors of the blocks before.

    Args:
        layer, before: as in the class above.
        carrying: the block's.
        path: the layer's name within its block.
        names: the layer's name in the model and those of the layers before.
    """

    def __init__(self, layer: Any, before: Sequence[Any], carrying: Carrying, path: str, names: Sequence[str]):
        super().__init__(layer, before)
        self._carrying, self._path, self._names = carrying, path, names

    def _carried(self, held: _Held) -> Carried | None:
        """What the layer before has handed on, None if there is none. Raises: ValueError if it was not called."""
        if not self.before:
            return None
        if self._path not in held.before:
            name, name_before, *_ = self._names
            raise ValueError(
                f"{self} of {name} takes what {name_before} computes, which must be called in every forward; got one "
                "that left it out"
            )
        return held.before[self._path]


class InputShortcut(_CarryingShortcut):
    """x_lora = x + the x of the layer before; the first layer's own x stands for it."""

    kind = "input"

    def _extended(self, own: Update, x: Tensor) -> Update:
        held = self._carrying.made(str(self))
        prev = self._carried(held)
        held.own[self._path] = Carried((x,), version(x))
        if prev is None:
            return own._replace(scaling=2 * own.scaling)
        (x_prev,), written = prev
        if version(x_prev) != written:
            raise ValueError(f"{self} needs inputs that nothing writes to after their layer; got one written to")
        key = id(x), version(x), id(x_prev)
        if key not in held.sums:
            held.sums[key] = x + x_prev, x, x_prev
        return own._replace(optional={"x_lora": held.sums[key][0]})


class MiddleShortcut(_CarryingShortcut):
    """h_in = the sum of the h of the layers before.

    Args:
        layer, before, carrying, path, names: as in the classes above.
        most: how many h are handed on; None sums all up.
    """

    kind = "middle"

    def __init__(self, layer: Any, before: Sequence[Any], carrying: Carrying, path: str, names, most: int | None):
        super().__init__(layer, before, carrying, path, names)
        self._most = most

    def _extended(self, own: Update, x: Tensor) -> Update:
        held = self._carrying.made(str(self))
        prev = self._carried(held)
        before = () if prev is None else prev.tensors
        total = sum(before[1:], before[0]) if before else None

        def take_h(h: Tensor) -> None:
            kept = (h, *before)[: self._most] if self._most is not None else (h if total is None else total + h,)
            held.own[self._path] = Carried(kept, 0)

        return own._replace(optional={} if total is None else {"h_in": total}, take_h=take_h)
