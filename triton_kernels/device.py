"""What the choices and the launches must know of a device and of how a tensor lies in its memory."""

import functools
import os
import re
import warnings
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
    index = device.index if device.index is not None else torch.accelerator.current_device_index()
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda" and target.arch == 90:
        warn_of_an_old_assembler(triton.__version__)
    tma = target.backend == "cuda" and target.arch >= 90
    return Device(tma, properties["multiprocessor_count"], properties["max_shared_mem"])


@functools.cache
def warn_of_an_old_assembler(triton_release: str) -> None:
    """Once a process, unless TRITON_PTXAS_PATH names another: Triton before 3.9 brings a ptxas that may overwrite the
    register operand of a product that still runs, on compute capability 9.0.

    Source: github.com/triton-lang/triton, issue 9433 and pull request 11781 (2026-09-14).
    """
    release = tuple(int(number) for number in re.findall(r"\d+", triton_release)[:2])
    if release < (3, 9) and not os.environ.get("TRITON_PTXAS_PATH"):
        warnings.warn(
            f"Triton {triton_release} brings a ptxas that may miscompile kernels for this GPU: install Triton 3.9 or "
            "newer, or set TRITON_PTXAS_PATH to a ptxas of release 13.3 or newer "
            "(pip install --no-deps nvidia-cuda-nvcc==13.5.37 brings one, see docs/install.md)",
            stacklevel=2,
        )


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
