"""Which back end serves a request: one if-chain, read by the ops on every call and by `python -m fused_lora info`.

A back end is a module with
    forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed) -> (y, h)
    backward(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs) -> [dx, dA, dB, dbias], None where not
    needed
for plain LoRA with x as [M, K]. The variants (x_lora, h_in, gate, ...) go to ops.reference, see ops.schema.
"""

import functools
import importlib
import importlib.util
import os

import torch

from fused_lora import _C

NAMES = ("auto", "cuda", "triton", "cpu", "reference")
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _module(name: str):
    return importlib.import_module(f"fused_lora.backends.{name}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def explain(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The back end that plain LoRA on this device and dtype gets from backend="auto", and the reason in a sentence.

    Args:
        device: where x lies.
        dtype: x's dtype.
    Returns: (name, reason).
    """
    device = torch.device(device)
    if dtype not in _FUSED_DTYPES:
        return "reference", f"{dtype} has no fused kernel; the PyTorch composition serves it"
    if device.type == "cpu":
        inside = dtype == torch.float32 and _C.cpu_prefers_lora_gemm()
        return "cpu", "C++ kernels, the base product inside" if inside else "C++ kernels around PyTorch's own GEMM"
    if device.type in ("cuda", "xpu"):
        if _has_triton():
            return (
                "triton",
                "Triton kernels; the compiled CUDA kernels run on request with backend='cuda' until they are measured",
            )
        return "reference", "Triton is not installed; the PyTorch composition serves it"
    return "reference", f"no fused kernel for device type {device.type!r}; the PyTorch composition serves it"


@functools.cache
def _auto(device: torch.device, dtype: torch.dtype):
    return _module(explain(device, dtype)[0])


def _refusal(name: str, x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor) -> str | None:
    """Why the back end `name` cannot serve the request, or None."""
    if name == "reference":
        return None
    if x.dtype not in _FUSED_DTYPES:
        return f"bfloat16, float16 and float32; got {x.dtype}"
    if name == "cpu":
        return None if x.device.type == "cpu" else f"CPU tensors; got {x.device}"
    if name == "triton":
        if not _has_triton():
            return "an installed Triton"
        if x.device.type == "cpu" and not interpreting():
            return "GPU tensors (or CPU tensors with TRITON_INTERPRET=1 in the environment); got cpu"
        return None
    if name == "cuda":
        return _module("cuda").refusal(x, weight, lora_A)
    raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")


def pick(backend: str, x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor):
    """The module that serves plain LoRA on these tensors; under "auto" never an error, for a named back end never
    another one.

    Args:
        backend: one of NAMES.
        x: [M, K], or dy [M, N] in the backward.
        weight, lora_A: [N, K], [R, K].
    Raises: ValueError if a named back end does not support the request, saying what it supports.
    """
    if backend == "auto":
        return _auto(x.device, x.dtype)
    refusal = _refusal(backend, x, weight, lora_A)
    if refusal is not None:
        raise ValueError(f"backend {backend!r} supports {refusal}")
    return _module(backend)


def check_variant(backend: str) -> None:
    """Raises ValueError if the named back end computes plain LoRA only."""
    if backend not in ("auto", "reference"):
        raise ValueError(
            f"backend {backend!r} supports plain LoRA only; x_lora, h_in, gate, out_scale, grad_row_scale, return_h "
            "and a trained weight need "
            "backend='reference' or 'auto'"
        )
