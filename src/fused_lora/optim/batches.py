"""Pairs of one shape as stacks, so that a step is a few products whatever the number of layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lora.optim.pairs import Pair


@dataclass
class Batch:
    """Pairs of one shape, dtype and device that have made the same number of steps, stacked in the dtype of the
    maths."""

    group: dict[str, Any]  # of hyperparameters
    pairs: list[Pair]
    step: int  # from 1
    A: Tensor  # [P, R, K] with P blocks of all pairs
    B: Tensor  # [P, N, R]
    g_A: Tensor  # [P, R, K]
    g_B: Tensor  # [P, N, R]
    scaling: Tensor  # [P, 1, 1]

    def split(self, stack: Tensor) -> Sequence[Tensor]:
        """A stack [P, ...] by pair."""
        return stack.split(self.pairs[0].blocks)

    def tensors(self, which: str) -> list[Tensor]:
        """The parameters A or B."""
        return [getattr(pair, which) for pair in self.pairs]

    def shaped(self, which: str, stack: Tensor) -> list[Tensor]:
        """A stack by pair, in the shape of the parameters A or B."""
        return [getattr(pair, f"like_{which}")(part) for pair, part in zip(self.pairs, self.split(stack))]

    def put(self, which: str, values: Tensor) -> None:
        """Make a stack the values of the parameters A or B, rounded to their dtype."""
        torch._foreach_copy_(self.tensors(which), self.shaped(which, values))


def batches(group: dict[str, Any], pairs: list[Pair], steps: list[int]) -> list[Batch]:
    """Pairs that have a gradient as few batches.

    Args:
        group: of hyperparameters.
        pairs: the pairs.
        steps: which step of each this is.
    Raises: ValueError for a gradient that is sparse or a factor that is sharded.
    """
    alike: dict[Any, list[Pair]] = {}
    for pair, step in zip(pairs, steps):
        pair.check()
        A, B = pair.A, pair.B
        key = A.shape, B.shape, pair.blocks, pair.interleaved, A.dtype, B.dtype, A.device, step
        alike.setdefault(key, []).append(pair)
    return [_batch(group, members, step=key[-1]) for key, members in alike.items()]


def _batch(group: dict[str, Any], pairs: list[Pair], step: int) -> Batch:
    first = pairs[0]
    dtype = torch.promote_types(maths_dtype(first.A), first.B.dtype)
    stacks = [
        torch.cat([pair.stack_A(pair.A) for pair in pairs]),
        torch.cat([pair.stack_B(pair.B) for pair in pairs]),
        torch.cat([pair.stack_A(dense_gradient(pair.A)) for pair in pairs]),
        torch.cat([pair.stack_B(dense_gradient(pair.B)) for pair in pairs]),
    ]
    scaling = torch.tensor([pair.scaling for pair in pairs], dtype=dtype, device=first.A.device)
    scaling = scaling.repeat_interleave(first.blocks)[:, None, None]
    A, B, g_A, g_B = (stack.to(dtype) for stack in stacks)
    return Batch(group, pairs, step, A, B, g_A, g_B, scaling)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat of tensors of one shape, without a copy where they are the neighbouring parts of one stack."""
    first = parts[0]
    base, start, size = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    neighbours = all(
        part.storage_offset() == start + i * size and part.untyped_storage().data_ptr() == base and part.is_contiguous()
        for i, part in enumerate(parts)
    )
    if not neighbours:
        return torch.cat(list(parts))
    return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())


def maths_dtype(t: Tensor) -> torch.dtype:
    """In which dtype a step of a parameter is computed: fp32, for fp64 that."""
    return torch.promote_types(t.dtype, torch.float32)


def dense_gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter, zeros without one. Raises: ValueError if it is sparse."""
    if p.grad is None:
        return torch.zeros_like(p)
    if p.grad.is_sparse:
        raise ValueError("gradients must be dense; got a sparse one (an embedding with sparse=True)")
    return p.grad
