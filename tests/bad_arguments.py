"""One wrong argument among right ones, for tests of messages."""

from typing import Any

import torch
from torch import Tensor


def with_change(good: dict[str, tuple[int, ...]], change: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a call, zeros, and its other arguments.

    Args:
        good: shapes of right tensors by name.
        change: name=shape for another or one more tensor, dtype_<name> and device_<name> for theirs, anything else is
            an argument that is no tensor.
    """
    dtypes = {k.removeprefix("dtype_"): v for k, v in change.items() if k.startswith("dtype_")}
    devices = {k.removeprefix("device_"): v for k, v in change.items() if k.startswith("device_")}
    plain = {k: v for k, v in change.items() if not k.startswith(("dtype_", "device_"))}
    shapes = good | {k: v for k, v in plain.items() if isinstance(v, tuple)}
    tensors = {
        k: torch.zeros(v, dtype=dtypes.get(k, torch.float32), device=devices.get(k, "cpu")) for k, v in shapes.items()
    }
    return tensors, {k: v for k, v in plain.items() if not isinstance(v, tuple)}
