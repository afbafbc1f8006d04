"""What the choices and the launches must know of a device and of how a tensor lies in its memory."""

import functools
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from fused_lora.triton_kernels.configs import Device

# The interpreter runs programs one after another: few of them, and both ways of splitting within reach of small tests.
_INTERPRETER = Device(tma=False, sms=4, shared_bytes=64 * 1024)


@functools.cache
def facts(device: torch.device) -> Device:
    """What the choices in configs.py depend on; a CPU is the interpreter's."""
    if device.type == "cpu":
        return _INTERPRETER
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    target = triton.runtime.driver.active.get_current_target()
    tma = target.backend == "cuda" and target.arch >= 90
    return Device(tma, properties["multiprocessor_count"], properties["max_shared_mem"])


def current(device: torch.device) -> AbstractContextManager:
    """Make a device the current one, to which launches go. torch.accelerator's context does nothing at index None."""
    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are computed: tf32 only where PyTorch's own matmul may."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def row_major(t: Tensor) -> Tensor:
    """t with neighbouring columns adjacent in memory and rows apart; any row stride is fine as it is."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def tma_ready(t: Tensor) -> bool:
    """Whether a descriptor can stand for the row-major matrix t: rows start on 16 bytes."""
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
