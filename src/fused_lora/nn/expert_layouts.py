"""How the factors of a mixture's experts lie: as PEFT's two matrices, stacked by expert, or with one factor for all.

PEFT writes A [E R, in] by expert and B [out, R E] by rank. Stacked they are [E, R, in] and [E, out, R]; a factor that
all experts share has a first dimension of 1. Tinker's adapters share those that face the residual stream: A of the up
projections (w1, w3) and B of the down projection (w2).
"""

from typing import Literal

from torch import Tensor

Factor = Literal["lora_A", "lora_B"]


def stacked(lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """PEFT's matrices as views by expert.

    Args:
        lora_A: [E R, in], or [R, in] where all experts share it.
        lora_B: [out, R E], or [out, R] where all experts share it.
        r: R.
    Returns: [E or 1, R, in] and [E or 1, out, R].
    """
    return lora_A.view(-1, r, lora_A.shape[1]), lora_B.view(lora_B.shape[0], r, -1).permute(2, 0, 1)


def unstacked(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's matrices A [E R, in] and B [out, R E] of stacked ones; a shared factor is repeated for each expert.

    Args:
        lora_A, lora_B: [E or 1, R, in] and [E or 1, out, R].
    """
    experts = max(lora_A.shape[0], lora_B.shape[0])
    lora_A, lora_B = lora_A.expand(experts, -1, -1), lora_B.expand(experts, -1, -1)
    return lora_A.reshape(-1, lora_A.shape[2]), lora_B.permute(1, 2, 0).reshape(lora_B.shape[1], -1)


def shared(lora_A: Tensor, lora_B: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Stacked factors with one for all experts, the first one's.

    Args:
        lora_A, lora_B: [E, R, in] and [E, out, R].
        factor: which to share.
    Returns: [1, R, in] and [E, out, R], or [E, R, in] and [1, out, R].
    Raises: ValueError if that would change an update: the factors of the experts differ, and not all of the others are
        zero.
    """
    if factor not in ("lora_A", "lora_B"):
        raise ValueError(f"factor must be 'lora_A' or 'lora_B'; got {factor!r}")
    one, other = (lora_A, lora_B) if factor == "lora_A" else (lora_B, lora_A)
    if other.detach().any() and not one.detach().eq(one.detach()[:1]).all():
        raise ValueError(
            f"{factor} must be alike for all experts, or the adapter fresh, to be shared; got factors that differ"
        )
    return (lora_A[:1], lora_B) if factor == "lora_A" else (lora_A, lora_B[:1])
