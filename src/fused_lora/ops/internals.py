"""Every private PyTorch name that the library uses, each with a public way to the same result.

FUSED_LORA_INTERNALS=0 in the environment takes the public ways only: slower by a few microseconds and a copy of y a
call, for a PyTorch in which one of these names has changed its meaning. A name that is absent is replaced in any case.
This module imports nothing of ours but the compiled part, so that back ends and layers may use it, too.
"""

import operator
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from fused_lora import _C

ALLOWED = os.environ.get("FUSED_LORA_INTERNALS", "1") != "0"

PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def _private(name: str):
    """The object of a dotted name under torch, or None if it is absent or unwanted."""
    if not ALLOWED:
        return None
    try:
        return operator.attrgetter(name)(torch)
    except (AttributeError, RuntimeError):
        return None


def _maybe() -> bool:
    """Somebody may listen: the caller takes the way that everybody sees."""
    return True


# Whether any device type is under autocast; if not, no device needs to be asked.
any_autocast_enabled = _private("_C._is_any_autocast_enabled") or _maybe


def without_autocast(t: Tensor) -> AbstractContextManager:
    """A context in which products keep their operands' dtype, on t's device: autocast has acted on what an op was given
    and must not act again half-way, least of all in a backward that runs under it."""
    return torch.autocast(t.device.type, enabled=False) if any_autocast_enabled() and autocasts(t) else nullcontext()


def autocasts(t: Any) -> bool:
    """Whether autocast is on for t's device type and casts its dtype; some types (meta) have none, fp64 and what is not
    floating stay, and what is no tensor is refused by who asks."""
    if not isinstance(t, Tensor) or t.dtype is torch.float64 or not t.is_floating_point():
        return False
    kind = t.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


# Whether a dispatch mode (fake tensors, tracing, selective checkpointing, counters) sees every operator that is called.
dispatch_modes_active = _private("_C._len_torch_dispatch_stack") or _maybe

# Whether torch.func or vmap is at work; untold, dispatch_modes_active() says maybe, and compiled graphs are plain.
_functorch_active = _private("_C._are_functorch_transforms_active") or is_dynamo_compiling

_probe = torch.zeros(1)


def _asked_forward_ad_active() -> bool:
    try:
        forward_ad.make_dual(_probe, _probe)
    except RuntimeError:  # there is no level
        return False
    return True


def _told_forward_ad_active() -> bool:
    return forward_ad._current_level >= 0


_has_level = _private("autograd.forward_ad._current_level") is not None
# Whether forward-mode derivatives (torch.autograd.forward_ad.dual_level) are at work.
forward_ad_active = _told_forward_ad_active if _has_level else _asked_forward_ad_active


def transforms_active() -> bool:
    """Whether anything differentiates or batches the operators that it sees, other than autograd's graph."""
    return _functorch_active() or forward_ad_active()


# Whether torch.jit.trace records.
is_tracing = _private("_C._is_tracing") or torch.jit.is_tracing

# Whether hooks are set on all modules at once (torch.nn.modules.module.register_module_forward_hook and its kin).
any_module_hook = _private("nn.modules.module._has_any_global_hook") or (lambda: False)


def bare(module: torch.nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: it has no hooks and no forward of its own,
    as accelerate gives modules."""
    return "forward" not in module.__dict__ and unhooked(module)


def unhooked(module: torch.nn.Module) -> bool:
    """Whether a module has no hooks on its forward and backward."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def runs(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether a call of the module runs this class's forward, hooks aside: neither a subclass nor the module has
    another."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and type(module).__call__ is torch.nn.Module.__call__
        and "forward" not in module.__dict__
    )


_TensorGuards = _private("_C._dynamo.guards.TensorGuards")


def alike(x: Tensor, *tensors: Tensor, rows: int = 1) -> Callable[..., bool] | None:
    """A check, for 0.5 us a call, whether as many other tensors are each like the one given here; None where PyTorch
    has none.

    They are alike in type, dtype, device, requires_grad, sizes and strides, but for the leading dimensions of the first
    `rows` of them, x among these, of which only the number counts; and in what PyTorch does with them: the same
    autocast, dispatch modes, tracing and torch.func transforms. No tensor must come twice. It is what guards the code
    that torch.compile makes.
    """
    if _TensorGuards is None:
        return None
    sizes: list[list[int | None]] = []
    strides: list[list[int | None]] = []
    for n, t in enumerate((x, *tensors)):
        free: list[int | None] = [None] * (t.dim() - 1)
        sizes.append([*free, t.shape[-1]] if n < rows else list(t.shape))
        strides.append([*free, t.stride(-1)] if n < rows else list(t.stride()))
    try:
        return _TensorGuards(x, *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (TypeError, RuntimeError):  # it wants other arguments
        return None


def marks(*tensors: Tensor) -> tuple[tuple, list] | None:
    """What differs once one of these tensors is another one, lies elsewhere, or was written in place as autograd counts
    it or, as four of its words tell, past its count; and the memory of each. None where PyTorch does not count, as in
    inference mode. Who compares marks must hold the tensors, whose ids others would get.

    The words are the first, the last and two others, of which whoever writes all of `t.data` changes one, as a rule.
    Nobody may free the memory meanwhile.
    """
    if not ALLOWED:
        return None
    try:
        memories = [t.untyped_storage() for t in tensors]
        return tuple([(id(t), t._version, _words(t, memory)) for t, memory in zip(tensors, memories)]), memories
    except RuntimeError:  # an inference tensor, or one without memory of its own
        return None


def _words(t: Tensor, memory: Any) -> bytes | int:
    """The address of t and its words, or the address alone where there are none to read."""
    if type(t) in PLAIN_TENSORS and t.is_cpu:
        # memory is smaller than the tensor in one that is sharded, while it is freed
        words = _C.sample(t, memory.data_ptr(), memory.nbytes())
        if words is not None:
            return words
    return t.data_ptr()


def wants_operators(*tensors: Tensor | None) -> bool:
    """Whether PyTorch must compute with one of these, which has no memory of its own, or not all that counts in it: it
    stands for an element of a batch, as torch.autograd.grad(is_grads_batched=True) makes them, or for zeros, or
    forward-mode derivatives are at work."""
    if is_dynamo_compiling():
        return False
    if forward_ad_active():
        return True
    for t in tensors:  # noqa: SIM110  a generator takes 0.2 us of the backward of a tiny layer's 7
        if t is not None and (t._is_zerotensor() or _is_batched(t)):
            return True
    return False


def _tried_is_batched(t: Tensor) -> bool:
    try:
        t.data_ptr()
    except RuntimeError:
        return True
    return False


_is_batched = _private("_C._functorch.is_legacy_batchedtensor") or _tried_is_batched


def _empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


# torch.empty_strided on the CPU, past the dispatcher, in half the time; nothing sees the call.
empty_on_cpu = _private("_C._dynamo.guards._empty_strided_cpu") or _empty_strided
# The same on the current CUDA device, in half of torch.empty's 5.2 us (H100's host, 2026-11-28).
empty_on_cuda = _private("_C._dynamo.guards._empty_strided_cuda") or partial(_empty_strided, device="cuda")


_unsafe_view = _private("ops.aten._unsafe_view.default")


def reshaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The contiguous, fresh t in another shape and nobody's view: a view as a Function's result could not be changed in
    place, as models do with a residual."""
    if _unsafe_view is not None:
        return _unsafe_view(t, shape)
    return t.view(shape).clone()


def function_apply(function: Any):
    """function.apply without its binding of arguments through inspect.signature, which costs 6 to 30 us a call and
    only torch.func needs; torch.compile takes none but function.apply itself. function.backward is called at once,
    where PyTorch asks each time whether it is called vjp."""
    if not ALLOWED:
        return function.apply
    if hasattr(function, "_backward_cls"):
        function._backward_cls.apply = function.backward
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


# The CUDA device that is current, and a device's current stream as an integer, without the Python objects around them.
current_device = _private("_C._cuda_getDevice") or torch.cuda.current_device
current_stream = _private("_C._cuda_getCurrentRawStream") or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)


def own_parameter(module: Any, name: str) -> Any:
    """A parameter of the module, past Module.__getattr__, or what FSDP1 puts before it during a forward: an attribute.
    None where there is none. An item of `_parameters` is what ZeRO-3 gathers during one, `get` is not."""
    attribute = module.__dict__.get(name)
    if attribute is not None:
        return attribute
    try:
        return module._parameters[name]
    except KeyError:  # a wrapper (parametrize) has put something else in its place
        return getattr(module, name, None)


def layer_tensors(layer: Any, adapter: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(weight, bias, lora_A[adapter], lora_B[adapter]) of a LoRA layer, past Module.__getattr__, which costs a small
    layer a tenth of its forward."""
    try:
        own, modules = layer._parameters, layer._modules
        lora_A, lora_B = modules["lora_A"]._parameters[adapter], modules["lora_B"]._parameters[adapter]
        return own["weight"], own["bias"], lora_A, lora_B
    except (KeyError, AttributeError):  # a wrapper (FSDP1, parametrize) has put something else in a parameter's place
        return _layer_tensors_by_name(layer, adapter)


def _layer_tensors_by_name(layer: Any, adapter: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return layer.weight, layer.bias, layer.lora_A[adapter], layer.lora_B[adapter]


def _parameter_by_name(module: Any, name: str) -> Any:
    return getattr(module, name, None)


if not ALLOWED:
    layer_tensors, own_parameter = _layer_tensors_by_name, _parameter_by_name


def _onednn_bf16_linear():
    """oneDNN's bf16 product with the bias in its epilogue, the operator that torch.compile calls; None where PyTorch or
    the CPU has none."""
    linear, supported = (
        _private("ops.mkldnn._linear_pointwise.default"),
        _private("ops.mkldnn._is_mkldnn_bf16_supported"),
    )
    return linear if torch.backends.mkldnn.is_available() and linear and supported and supported() else None


_bf16_linear, _onednn_enabled = _onednn_bf16_linear(), _private("_C._get_mkldnn_enabled")


def linear_with_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(x, weight, bias), bit for bit; of 2-D contiguous bf16 operands on a CPU with the bias added in oneDNN's
    epilogue.

    F.linear fills its result with the bias first: the same bits, for 1 to 6 % more time (EPYC 9004, torch 2.13.0,
    2026-11-24).
    """
    fused = _bf16_linear is not None and x.dtype is torch.bfloat16 and _onednn_enabled is not None and _onednn_enabled()
    # of strided operands it would copy x, take a reference kernel for W, and read the bias as if it lay in one piece
    if fused and x.shape[0] > 0 and all(t.is_contiguous() for t in (x, weight, bias)):
        return _bf16_linear(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
