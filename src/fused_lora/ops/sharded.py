"""The op on DTensors: each process computes its part of y on its shards, and no weight is gathered.

One mesh dimension may be, for x, weight, lora_A and lora_B in this order:
    all whole                                                y whole
    x split over rows, the others whole                      y split over rows
    column-parallel, x and lora_A whole, weight and lora_B split over N    y split over N
    row-parallel, lora_B whole, x, weight and lora_A split over K          y a sum to be formed, [..., N] each
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Size, Tensor


class _Rule(NamedTuple):
    """The placements of y and of the gradients along one mesh dimension."""

    y: Any
    x: Any
    weight: Any
    lora_A: Any
    lora_B: Any
    bias: Any
    first_adds_bias: bool = False


def on_shards(
    op: Callable[..., Any], x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> Tensor | None:
    """op(x, weight, lora_A, lora_B, bias=bias) on each process's part; None if nothing is a DTensor or the placements
    need communication before the product.

    Args:
        op: plain LoRA of plain tensors.
        x, weight, lora_A, lora_B, bias: [..., K], [N, K], [R, K], [N, R], [N]; DTensors of one mesh.
    Returns: y as a DTensor [..., N].
    Raises: ValueError if only some are DTensors.
    """
    named = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
    tensors: dict[str, Any] = {name: t for name, t in named.items() if t is not None}
    sharded = [name for name, t in tensors.items() if hasattr(t, "device_mesh")]
    if not sharded:
        return None
    if len(sharded) < len(tensors):
        raise ValueError(
            f"{', '.join(tensors)} must be DTensors all or none (FSDP shards a whole layer or a block, no adapter by "
            f"itself; tensor parallelism comes by fused_lora.distributed); got DTensors for {', '.join(sharded)}"
        )
    mesh = tensors["x"].device_mesh
    rules = _rules(mesh, tensors)
    if rules is None:
        return None
    parts: dict[str, Any] = {}
    for name, t in tensors.items():
        gradient = tuple(getattr(rule, name) for rule in rules)
        if name != "x" and t.requires_grad and gradient != t.placements:
            t = t.redistribute(placements=t.placements)  # in the backward, that of the gradient
        parts[name] = t.to_local(grad_placements=gradient)
    if bias is not None and any(rule.first_adds_bias and mesh.get_local_rank(dim) for dim, rule in enumerate(rules)):
        parts["bias"] = parts["bias"] * 0
    return _whole(op(**parts), mesh, [rule.y for rule in rules], (*x.shape[:-1], weight.shape[0]))


def _rules(mesh: Any, tensors: dict[str, Any]) -> list[_Rule] | None:
    """The rule of each mesh dimension, None if one has none or the meshes differ."""
    x, weight = tensors["x"], tensors["weight"]
    if any(t.device_mesh != mesh for t in tensors.values()):
        return None
    rules = []
    for dim, pieces in enumerate(mesh.shape):
        N_K_even = [size % pieces == 0 for size in weight.shape]
        rule = _rule({name: t.placements[dim] for name, t in tensors.items()}, x.dim() - 1, N_K_even)
        if rule is None:
            return None
        rules.append(rule)
    return rules


def _rule(placed: dict[str, Any], last: int, N_K_even: list[bool]) -> _Rule | None:
    """The rule of one mesh dimension; `last` is x's last dimension, and N and K must divide evenly to be split."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, total, rows, columns = Replicate(), Partial(), Shard(0), Shard(1)
    placed = {"bias": whole, **placed} if placed["lora_B"] == whole else {"bias": rows, **placed}
    x, *factors = (placed[name] for name in ("x", "weight", "lora_A", "lora_B", "bias"))
    if factors == [whole] * 4:
        if x == whole:
            return _Rule(whole, whole, whole, whole, whole, whole)
        if type(x) is Shard and x.dim < last:
            return _Rule(x, x, total, total, total, total)
    if x == whole and factors == [rows, whole, rows, rows] and N_K_even[0]:
        return _Rule(Shard(last), total, rows, total, rows, rows)
    if x == Shard(last) and factors == [columns, columns, whole, whole] and N_K_even[1]:
        return _Rule(total, x, columns, columns, total, total, first_adds_bias=True)
    return None


def _whole(part: Tensor, mesh: Any, placements: list[Any], shape: tuple[int, ...]) -> Tensor:
    """The DTensor [..., N] of which this process holds a part."""
    from torch.distributed.tensor import DTensor

    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * max(size, 1))
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=Size(shape), stride=tuple(stride))
