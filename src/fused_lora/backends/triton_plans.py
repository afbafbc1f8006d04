"""The plans of the Triton back end by name: words of triton_kernels/configs.py, such as "one_launch+two_reads".

What a caller leaves out, configs.py chooses. With dropout there is no one_launch: the words then mean the rest.
"""

import functools
from typing import Any

from torch import Tensor

from fused_lora.backends import Request, read_plan
from fused_lora.triton_kernels.configs import PLAN_WORDS, BackwardPlan, ForwardPlan, backward_plan, forward_plan
from fused_lora.triton_kernels.device import facts, tma_ready

_TAKES = {
    "one_launch": "TMA, half precision, up to 32 ranks, rows of 16 bytes and tiles for every multiprocessor",
    "one_read": "up to 32 ranks",
}


def plans(request: Request) -> tuple[str, ...]:
    """See `backends`: the choice of configs.py, what it makes on request only, dh and dB by the other number of reads
    of dy."""
    if request.optional:
        return ("",)
    made = {_launches(request, ""): ""}
    for plan in ("one_launch", "one_launch+two_reads", "no_prefetch", "narrow", "one_read", "two_reads"):
        if _impossible_word(request, plan) is None:
            made.setdefault(_launches(request, plan), plan)
    return tuple(made.values())


def check_plan(request: Request, plan: str) -> None:
    """See `backends`: words of configs.py, for plain LoRA."""
    read_plan(plan, PLAN_WORDS)
    if request.optional:
        raise ValueError(f"plan must be left out with {', '.join(request.optional)}; got {plan!r}")
    word = _impossible_word(request, plan)
    if word is not None:
        raise ValueError(f"plan must not say {word}, which takes {_TAKES[word]}; got {plan!r}")


def of_forward(plan: str, *operands: Tensor) -> dict[str, Any]:
    """What the plan says to `forward_plan`; one launch only where its operands lie as TMA needs them."""
    return _that_serves(_forward_words(plan), operands)


def of_backward(plan: str, *operands: Tensor) -> dict[str, Any]:
    """What the plan says to `backward_plan`, likewise."""
    return _that_serves(read_plan(plan, PLAN_WORDS), operands)


def _that_serves(said: dict[str, Any], operands: tuple[Tensor, ...]) -> dict[str, Any]:
    serves = "one_launch" not in said or all(map(tma_ready, operands))
    return said if serves else {**said, "one_launch": False}


@functools.cache
def _forward_words(plan: str) -> dict[str, Any]:
    said = read_plan(plan, PLAN_WORDS)
    return {name: value for name, value in said.items() if name != "one_read"}  # of dy


def _launches(request: Request, plan: str) -> tuple[ForwardPlan, BackwardPlan]:
    """What a plan makes of a forward and of a backward that both A and B need, without dropout."""
    sizes = max(request.M, 1), request.N, request.K, request.R, request.dtype.itemsize, False
    device = facts(request.device)
    forward = forward_plan(*sizes, device, **_forward_words(plan))
    return forward, backward_plan(*sizes, True, True, True, device, **read_plan(plan, PLAN_WORDS))


def _impossible_word(request: Request, plan: str) -> str | None:
    """A word of the plan that cannot be followed, or None."""
    rows = [
        size * request.dtype.itemsize % 16 for size in (request.N, request.K, request.R)
    ]  # of A, B and the products
    for word in plan.split("+"):
        forward, backward = _launches(request, word)
        possible = {
            "one_launch": forward.lora_gemm_shrink is not None and request.aligned and not any(rows),
            "one_read": backward.dy_pass is not None,
        }
        if not possible.get(word, True):
            return word
    return None
