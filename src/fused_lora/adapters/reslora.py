"""ResLoRA over a model: shortcuts between the layers of one name in neighbouring blocks, and their merging."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.adapters.blocks import Block, rows_of_blocks
from fused_lora.adapters.model import check_not_merged
from fused_lora.nn.linear import LoRALinear
from fused_lora.variants.reslora import BlockShortcut, Carrying, Estimate, InputShortcut, MiddleShortcut, Shortcut

KINDS = ("input", "block", "middle")
MODES = ("exact", "input", "weights")


class Merged(NamedTuple):
    """What a merge did."""

    exact: bool  # whether the merged model computes what the linked one does; if not, it comes near it at best
    factors: dict[str, list[float]]  # by layer: how much the layers before were taken for, the nearest first


class _Linked(NamedTuple):
    name: str
    layer: LoRALinear
    before: list[str]  # the names of the layers that it takes the shortcut from, the nearest first


def link_reslora(model: nn.Module, shortcut: str = "input", pre_num: int = 1) -> "ResLoRA":
    """Link the layers of a model's active adapter by ResLoRA's shortcuts.

    Equivalent to, for layer n of the layers with one name in a row of blocks and its A, B and scaling::

        input   y = F.linear(x, weight, bias) + scaling * F.linear(F.linear(x + x_before, A), B)
        block   y = F.linear(x, weight, bias) + scaling * sum(F.linear(F.linear(x, A_k), B_k) for the layers n - m to n)
        middle  y = F.linear(x, weight, bias) + scaling * F.linear(sum(F.linear(x_k, A_k) for the layers n - m to n), B)

    with m = pre_num, or as many layers as there are. "Before" is the block before in the same row, with a layer of the
    same name, sizes and rank; where there is none, or another kind comes between, the chain begins anew; with "input"
    its first layer takes its own x twice. "block" needs nothing of other layers' forwards. "input" and "middle" hand
    tensors on with the block's output, so blocks must get what the block before has returned; under checkpointing
    use_reentrant=False keeps these tensors (with "input" all of the layers' inputs) until the backward. Every dropout
    is a layer's own.

    Args:
        model: with one adapter active, not merged, in wrappers or not, not sharded.
        shortcut: input, block or middle.
        pre_num: m, how many layers before take part; -1 for all; with "input" 0 or 1. 0 is plain LoRA.
    Returns: what merges and removes the links.
    Raises: ValueError naming the argument, what was expected and what was given; the model is unchanged then.
    Source: Shi et al., arXiv 2402.18039.
    """
    if shortcut not in KINDS:
        raise ValueError(f"shortcut must be one of {', '.join(KINDS)}; got {shortcut!r}")
    least, most = (0, 1) if shortcut == "input" else (-1, None)
    if type(pre_num) is not int or pre_num < least or (most is not None and pre_num > most):
        wanted = "0 or 1 with shortcut 'input'" if most else "an int >= -1"
        raise ValueError(f"pre_num must be {wanted}; got {pre_num!r}")
    rows = rows_of_blocks(model, "ResLoRA")
    for row in rows:
        for block in row:
            for path, layer in block.layers.items():
                if not isinstance(layer.active_adapter, str):
                    raise ValueError(
                        f"ResLoRA needs one active adapter; got {layer.active_adapter} at {block.name}.{path}"
                    )
    return ResLoRA(model, rows, shortcut, pre_num)


class ResLoRA:
    """The links that `link_reslora` has made, which returns it."""

    def __init__(self, model: nn.Module, rows: list[list[Block]], shortcut: str, pre_num: int):
        self._model, self._shortcut = model, shortcut
        self._carrying: list[tuple[Carrying, nn.Module]] = []
        self._linked: list[_Linked] = []
        if pre_num == 0:
            return
        for row in rows:
            chains: dict[str, list[_Linked]] = defaultdict(list)
            for place, block in enumerate(row):
                carrying = Carrying(place == 0, place == len(row) - 1, block.layers)
                if shortcut != "block":
                    carrying.watch(block.module)
                    self._carrying.append((carrying, block.module))
                for path, layer in block.layers.items():
                    chain = chains[path]
                    if chain and not _alike(chain[-1].layer, layer):
                        chain.clear()
                    before = chain[::-1] if pre_num < 0 else chain[::-1][:pre_num]
                    chain.append(_Linked(f"{block.name}.{path}".strip("."), layer, [each.name for each in before]))
                    layer.link = _made(shortcut, chain[-1], [each.layer for each in before], carrying, path, pre_num)
                    self._linked.append(chain[-1])

    def merge(
        self, mode: str = "exact", batches: Sequence[Mapping[str, Any] | Tensor] = (), window: int = 100
    ) -> Merged:
        """Fold the adapter and its shortcuts into the weights, until `unmerge`.

        exact    "block" alone: W + s (sum of B_k A_k)
        input    lossy: x_before, or a layer's A x before, is taken for a multiple of this layer's: the ratio of their
                 mean Frobenius norms over the last `window` batches; W + (1 + factors) s B A
        weights  lossy: the same with the ratio of the norms of the merged weights that made them, 1 where there are
                 none; of "middle" with each layer's own A: W + s B (A + sum of factor_k A_k)

        A lossy merge's model is another one than the linked one: the paper has it about 1 % worse.

        Args:
            mode: as above.
            batches: for "input", what the model is called with, in eval mode and without gradients: keywords, or one
                tensor.
            window: how many batches count, 1 or more.
        Returns: whether it is exact, and the factors.
        Raises: ValueError for a mode that is none of the shortcut's, no batches, a layer that no batch reaches, or as
            `LoRALinear.merge`; nothing is merged then.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if (mode == "exact") != (self._shortcut == "block") and self._linked:
            modes = "'exact'" if self._shortcut == "block" else "'input' or 'weights', which are lossy,"
            raise ValueError(f"mode must be {modes} with shortcut {self._shortcut!r}; got {mode!r}")
        if (mode == "input") != bool(batches):
            raise ValueError(f"batches must be given for mode 'input' and no other; got {len(batches)} for {mode!r}")
        if type(window) is not int or window < 1:
            raise ValueError(f"window must be an int >= 1; got {window!r}")
        check_not_merged(self._model, "ResLoRA is merged")
        norms = self._norms(batches[-window:]) if batches else {}
        missed = [each.name for each in self._linked if each.name not in norms] if batches else []
        if missed:
            raise ValueError(f"batches must reach every layer that is linked; got none that calls {missed[0]}")
        factors: dict[str, list[float]] = {}
        try:
            for linked in self._linked:
                self._merge_one(linked, mode, norms, factors)
        except BaseException:
            self.unmerge()
            raise
        finally:
            for linked in self._linked:
                _link_of(linked).estimate = None
        return Merged(self._shortcut == "block", factors)

    def _merge_one(self, linked: _Linked, mode: str, norms: dict[str, float], factors: dict[str, list[float]]) -> None:
        """Merge one layer after those before it, whose norms are then those of merged weights."""
        if mode == "exact":
            factors[linked.name] = [1.0] * len(linked.before)
        elif mode == "input":
            own = norms[linked.name] or 1.0
            factors[linked.name] = [norms[name] / own for name in linked.before]
        else:
            made_by = [norms.get(name) for name in linked.before]  # a layer's x comes from the weight before it
            latest = made_by[0] if made_by else None
            earlier = [*made_by[1:], norms.get(self._one_before(linked))]
            factors[linked.name] = [norm / latest if norm and latest else 1.0 for norm in earlier[: len(made_by)]]
        if self._shortcut == "input" and not linked.before:
            factors[linked.name] = [1.0]  # it takes its own x twice, which is exact
        of_matrices = self._shortcut == "middle" and mode == "weights"
        _link_of(linked).estimate = Estimate(factors[linked.name], of_matrices)
        linked.layer.merge()
        if mode == "weights":
            norms[linked.name] = _norm(linked.layer.weight).item()

    def _one_before(self, linked: _Linked) -> str:
        """The layer before the furthest one that a layer takes its shortcut from, "" if there is none."""
        names = {each.name: each for each in self._linked}
        before = names[linked.before[-1]].before if linked.before else []
        return before[0] if before else ""

    @torch.no_grad()
    def _norms(self, batches: Sequence[Mapping[str, Any] | Tensor]) -> dict[str, float]:
        """The mean Frobenius norms of the layers' x, of "middle" of their A x, over the batches."""
        found: dict[str, list[Tensor]] = defaultdict(list)

        def seen(name: str) -> Callable:
            def hook(layer: LoRALinear, args: tuple[Tensor, ...]) -> None:
                lora_A = layer.lora_A[layer.active_adapters[0]]
                x = args[0] if self._shortcut == "input" else args[0] @ lora_A.to(args[0].dtype).t()
                found[name].append(_norm(x))

            return hook

        training = [module for module in self._model.modules() if module.training]
        hooks = [each.layer.register_forward_pre_hook(seen(each.name)) for each in self._linked]
        try:
            self._model.eval()
            for batch in batches:
                self._model(**batch) if isinstance(batch, Mapping) else self._model(batch)
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True
        return {each.name: torch.stack(found[each.name]).mean().item() for each in self._linked if found[each.name]}

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        for linked in self._linked:
            if linked.layer.merged:
                linked.layer.unmerge()

    def remove(self) -> None:
        """Take the links off: the adapter is plain LoRA again. Raises: ValueError while merged."""
        if self._linked:
            check_not_merged(self._model, "ResLoRA is removed")
        for carrying, block in self._carrying:
            carrying.unwatch(block)
        for linked in self._linked:
            linked.layer.link = None
        self._carrying, self._linked = [], []


def _alike(one: LoRALinear, other: LoRALinear) -> bool:
    """Whether two layers have an adapter of one name, of the same shapes."""
    name: Any = other.active_adapter
    return name == one.active_adapter and all(
        ours[name].shape == theirs[name].shape
        for ours, theirs in ((one.lora_A, other.lora_A), (one.lora_B, other.lora_B))
    )


def _made(shortcut: str, linked: _Linked, before: list, carrying: Carrying, path: str, pre_num: int) -> Shortcut:
    if shortcut == "block":
        return BlockShortcut(linked.layer, before)
    names = [linked.name, *linked.before]
    if shortcut == "input":
        return InputShortcut(linked.layer, before, carrying, path, names)
    return MiddleShortcut(linked.layer, before, carrying, path, names, None if pre_num < 0 else pre_num)


def _link_of(linked: _Linked) -> Shortcut:
    link = linked.layer.link
    assert isinstance(link, Shortcut)
    return link


@torch.no_grad()
def _norm(t: Tensor) -> Tensor:
    """The Frobenius norm, in fp32 at least."""
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
