"""What a backward reads of the op's result, which its caller may change in place: models have nn.ReLU(inplace=True)
behind a layer."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fused_lora.ops.internals import ALLOWED, PLAIN_TENSORS, dispatch_modes_active


def keep_result(y: Tensor) -> tuple[Tensor, Callable[[], bool] | None]:
    """What to save of y, the fresh result of an autograd Function, and whether y has been changed in place since; None
    where autograd sees to that itself and raises.

    Saved is y's memory, as autograd's own copy of the tensor, which it would refuse once y has changed. An empty tensor
    shares y's count of changes and none of its memory, which hooks on saved tensors may take elsewhere.
    """
    if is_dynamo_compiling() or type(y) not in PLAIN_TENSORS:
        return y, None
    if not ALLOWED:
        return y.clone(), lambda: False
    if dispatch_modes_active() or y.is_inference():
        return y, None
    counter, before = y.detach(), y._version
    counter.data = torch.empty(0, dtype=y.dtype, device=y.device)
    return y.data, lambda: counter._version != before
