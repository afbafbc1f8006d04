"""The pairs of A and B in a model, found by module: in layers of ours and of PEFT."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Pair:
    """Two factors of an update, `scaling` B A: one of matrices, or as many as a layer has experts or groups.

    A stack of A is [blocks, R, K], a stack of B [blocks, N, R].

    Args:
        A: [blocks R, ...], block after block, K elements a row.
        B: [blocks N, R, ...], block after block, or interleaved [N, R blocks].
        scaling: the factor of their product.
        name: of the layer.
        blocks: how many updates the tensors hold.
        interleaved: whether neighbouring columns of B are of different blocks, as in PEFT's files of experts.
    """

    A: Tensor
    B: Tensor
    scaling: float
    name: str
    blocks: int = 1
    interleaved: bool = False

    def stack_A(self, t: Tensor) -> Tensor:
        """The blocks [blocks, R, K] of a tensor of A's shape."""
        return t.reshape(self.blocks, t.shape[0] // self.blocks, -1)

    def stack_B(self, t: Tensor) -> Tensor:
        """The blocks [blocks, N, R] of a tensor of B's shape."""
        if self.interleaved:
            return t.reshape(t.shape[0], -1, self.blocks).permute(2, 0, 1)
        return t.reshape(self.blocks, t.shape[0] // self.blocks, -1)

    def like_A(self, stack: Tensor) -> Tensor:
        """A tensor of A's shape of its blocks."""
        return stack.reshape(self.A.shape)

    def like_B(self, stack: Tensor) -> Tensor:
        """A tensor of B's shape of its blocks."""
        return (stack.permute(1, 2, 0) if self.interleaved else stack).reshape(self.B.shape)

    def check(self) -> None:
        """Raises ValueError if A and B are not whole tensors of one rank."""
        for which, t in (("A", self.A), ("B", self.B)):
            if hasattr(t, "device_mesh") or t.dim() < 2:
                raise ValueError(
                    f"{self.name}: lora_{which} must be a whole tensor, both factors are needed for a step (keep the "
                    f"adapters out of sharding); got a {type(t).__name__} of shape {list(t.shape)}"
                )
        ranks = self.A.shape[0] / self.blocks, self.B.shape[1:].numel() / (self.blocks if self.interleaved else 1)
        rows = 1 if self.interleaved else self.blocks
        if ranks[0] != ranks[1] or not ranks[0].is_integer() or self.B.shape[0] % rows:
            raise ValueError(
                f"{self.name}: lora_A and lora_B must have one rank; got shapes {list(self.A.shape)} and "
                f"{list(self.B.shape)}{f' of {self.blocks} blocks' if self.blocks > 1 else ''}"
            )


def replaced(optimizer: str) -> ValueError:
    """For an optimizer whose parameters are no more those that it was given."""
    return ValueError(
        f"{optimizer} needs A and B themselves among its parameters, both factors for a step; got others, perhaps "
        "pieces of all parameters in one, which DeepSpeed's ZeRO puts in their place"
    )


@dataclass(frozen=True)
class Adapter:
    """The tensors of one adapter in one layer."""

    name: str  # of the layer
    module: Any
    A: Tensor
    B: Tensor
    scaling: Any  # a number or a tensor of one element
    embedding: bool  # whether A is looked up by tokens

    def pair(self) -> Pair:
        """As a pair that is checked."""
        if hasattr(self.module, "lora_E"):
            raise ValueError(f"{self.name}: the update must be scaling * B A; got AdaLoRA's three factors")
        blocks, interleaved = 1, hasattr(self.module, "parameter_name")
        if interleaved:
            blocks = int(self.module.num_experts)
            if self.A.shape[0] != self.B.shape[1]:
                raise ValueError(
                    f"{self.name}: each expert must have factors of its own; got one that all {blocks} share, of "
                    f"shapes {list(self.A.shape)} and {list(self.B.shape)}"
                )
        elif self.A.dim() > 2:
            blocks = int(getattr(getattr(self.module, "base_layer", None), "groups", 1))
        pair = Pair(self.A, self.B, float(self.scaling), self.name, blocks, interleaved and blocks > 1)
        pair.check()
        return pair


def adapters_in(model: nn.Module) -> Iterator[Adapter]:
    """The adapters of a model's layers, of ours and of PEFT, each layer once."""
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, Mapping) or "lora_A" not in module._modules:
            continue
        for kind in ("lora", "lora_embedding"):
            lora_As, lora_Bs = (getattr(module, f"{kind}_{which}", {}) for which in "AB")
            for adapter in (adapter for adapter in scaling if adapter in lora_As):
                A, B = (getattr(entry, "weight", entry) for entry in (lora_As[adapter], lora_Bs[adapter]))
                embedding = kind == "lora_embedding" or isinstance(getattr(module, "base_layer", None), nn.Embedding)
                yield Adapter(name, module, A, B, scaling[adapter], embedding)


def magnitudes(adapters: Iterable[Adapter]) -> set[int]:
    """The ids of DoRA's magnitudes in the layers of these adapters, which PEFT keeps in modules, we as parameters."""
    holders = [a.module.lora_magnitude_vector for a in adapters if "lora_magnitude_vector" in a.module._modules]
    return {id(p) for holder in holders for p in holder.parameters()}


def lora_pairs(model: nn.Module) -> list[Pair]:
    """The pairs of A and B that train, by module: in layers of ours and of PEFT, each once.

    Args:
        model: with adapters, or a part of it.
    Returns: the pairs in the order of the modules. Where only one of A and B trains there is none.
    Raises: ValueError naming the layer, where one factor belongs to two pairs, is sharded, or where A and B are no
        factors of a product B A.
    """
    pairs: list[Pair] = []
    owners: dict[int, Pair] = {}
    for adapter in adapters_in(model):
        if not (adapter.A.requires_grad and adapter.B.requires_grad):
            continue
        pair = adapter.pair()
        known = owners.get(id(pair.A)), owners.get(id(pair.B))
        if known[0] is not known[1]:
            other = known[0] or known[1]
            raise ValueError(f"{pair.name}: A and B must belong to one pair; got one that {other and other.name} has")
        if known[0] is None:
            pairs.append(pair)
            owners[id(pair.A)] = owners[id(pair.B)] = pair
    return pairs


def pair_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of all that trains: the pairs, other matrices, and vectors and DoRA's magnitudes, which do not
    decay."""
    pairs = lora_pairs(model)
    paired = {id(t) for pair in pairs for t in (pair.A, pair.B)}
    vectors = magnitudes(adapters_in(model))
    groups: list[dict[str, Any]] = [{"params": pairs}, {"params": []}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        if p.requires_grad and id(p) not in paired:
            groups[2 if p.dim() < 2 or id(p) in vectors else 1]["params"].append(p)
    return [group for group in groups if group["params"]]
