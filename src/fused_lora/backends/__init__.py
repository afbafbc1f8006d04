"""Which back end serves a request: every one says itself what it refuses, and the first willing one of a line is taken.

A back end is a module with
    forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, variant) -> (y, h)
    backward(dy, dh, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs, variant) -> Gradients
    refusal(request) -> why it cannot serve the request, to be read after "backend 'name' supports", or None
    summary(request) -> what it runs, in a phrase
for x as [M, K] and the optional tensors 2-D, as `ops.reference` defines them.
"""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch

NAMES = ("auto", "cuda", "triton", "cpu", "reference")
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Who stands in line for a device type under backend="auto". The compiled CUDA kernels run on request, until measured.
_LINES = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference"), "xpu": ("triton", "reference")}


class Request(NamedTuple):
    """What decides who can serve a call: the same for its forward and its backward."""

    device: torch.device
    dtype: torch.dtype  # of x, weight, bias
    adapter_dtype: torch.dtype  # of lora_A, lora_B
    N: int
    K: int
    R: int
    aligned: bool  # the weight's rows lie in one piece each, from addresses that are multiples of 16 bytes
    optional: tuple[str, ...]  # names of the optional tensors that are given


def only_plain(request: Request) -> str | None:
    """The refusal of a back end that computes plain LoRA only."""
    return f"plain LoRA only; got {', '.join(request.optional)}" if request.optional else None


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fused_lora.backends.{name}" if name != "reference" else "fused_lora.ops.reference")


def refusal(name: str, request: Request) -> str | None:
    """Why the back end of this name cannot serve the request, to be read after "backend 'name' supports", or None."""
    try:
        return _module(name).refusal(request)
    except ModuleNotFoundError as error:
        return f"an installed {error.name}; there is none"


@functools.lru_cache(4096)
def pick(backend: str, request: Request) -> ModuleType:
    """The module that serves a request: under "auto" the first willing one of the device's line, else the named one.

    Args:
        backend: one of NAMES.
        request: what decides.
    Raises: ValueError if a named back end does not support the request, saying what it supports.
    """
    if backend == "auto":
        return _module(next(name for name in line(request.device) if refusal(name, request) is None))
    refused = refusal(backend, request)
    if refused is not None:
        raise ValueError(f"backend {backend!r} supports {refused}")
    return _module(backend)


def line(device: torch.device) -> tuple[str, ...]:
    """The back ends that backend="auto" asks on a device, in order; the last one never refuses."""
    return _LINES.get(device.type, ("reference",))


def explain(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The back end that plain LoRA on this device and dtype gets from backend="auto", and the reason in a sentence.

    Args:
        device: where x lies.
        dtype: x's dtype.
    Returns: (name, reason).
    """
    request = Request(torch.device(device), dtype, dtype, 4096, 4096, 16, True, ())
    refusals: list[str] = []
    for name in line(request.device):
        refused = refusal(name, request)
        if refused is None:
            return name, "; ".join([*refusals, _module(name).summary(request)])
        refusals.append(f"{name} supports {refused}")
    raise AssertionError(f"{name}, the last of the line, never refuses")
