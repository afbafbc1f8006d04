"""remembered(): small tensors that calls with the same numbers share."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

from fused_lora.ops.internals import dispatch_modes_active

T = TypeVar("T")


def remembered(make: Callable[..., T]) -> Callable[..., T]:
    """`make`, whose last 256 results are kept, none of them an inference tensor; but what it makes under a dispatch
    mode (fake tensors, a trace) belongs to that mode and must not outlive it."""

    def fresh(*given: object) -> T:
        with torch.inference_mode(False):
            return make(*given)

    kept = lru_cache(256)(fresh)

    @wraps(make)
    def of(*given: object) -> T:
        return fresh(*given) if dispatch_modes_active() else kept(*given)

    return of
