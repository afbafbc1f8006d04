"""Launches that skip what Triton does anew at every launch.

Triton binds, specialises and hashes all arguments each time. Here the first launch of a kind goes through Triton, which
returns the compiled kernel; later ones call its launcher, with the pointers, floats and stream of the moment: 6.0 us of
Python's time for lora_gemm's arguments, where Triton takes 13.0 (an AMD EPYC, Triton 3.9, a launcher that does nothing,
2026-11-24). Two launches are of one kind if they agree in kernel, device, constexprs, options, the value of every int,
the type of every float and bool, and of every tensor the dtype and what Triton specialises on (16-byte alignment; on
AMD also whether its storage is below 2 GiB): at least as much as Triton's own key. Its compile settings (TRITON_DEBUG
and the like) are those of the first launch of a kind. Triton itself launches in its interpreter, under a profiler's
hooks, on releases not listed here and for arguments of other types.
"""

import itertools
import re

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# From 3.6 to 3.9 JITFunction.run ends in the call that _Prepared makes, constexprs among the arguments. Read a release
# before adding it.
_KNOWN = (3, 6) <= tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) <= (3, 9)
_HIP = torch.version.hip is not None
_MOST = 4096  # kinds, after which all are forgotten: ever new sizes must not fill the memory
_ready = {}  # kind: the launcher, function, metadata and compiled kernel, which must outlive its function
_prepared = {}  # kernel, constexprs and options: launch's _Prepared
_serials = itertools.count()  # unlike an address, never given twice


def _put(cache: dict, key, value):
    if len(cache) >= _MOST:
        cache.clear()
    cache[key] = value


def _kind(key: list, args) -> tuple | None:
    """key with what the compiled kernel may depend on in args; None where Triton must look itself."""
    add = key.append
    for a in args:
        kind = type(a)
        if kind is int or a is None:
            add(a)
        elif isinstance(a, Tensor):
            add(a.dtype)
            add(a.data_ptr() % 16 == 0)
            if _HIP:
                add(a.untyped_storage().nbytes() < 2**31)
        elif kind is float or kind is bool:
            add(kind)
        elif kind is TensorDescriptor:
            add((a.base.dtype, *a.shape, *a.strides, *a.block_shape))
        else:
            return None
    return tuple(key)


class _Prepared:
    """A kernel with its constexprs and options fixed: prepared(grid, *rest) passes the parameters before them."""

    def __init__(self, kernel, **fixed):
        self._kernel, self._fixed, self._serial = kernel, fixed, next(_serials)
        self._values = tuple(fixed[name] for name in kernel.arg_names if name in fixed)
        self._count = len(kernel.arg_names) - len(self._values)
        # Constexprs come last and all are given; one among the rest would have to be in the kind with its value,
        # whatever its type.
        self._direct = _KNOWN and {*kernel.constexprs} == {*range(self._count, len(kernel.arg_names))}

    def __call__(self, grid, *rest):
        if not self._direct or self._hooked():
            self._kernel[grid](*rest, **self._fixed)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        kind = _kind([self._serial, device], rest)
        ready = _ready.get(kind)
        if ready is None:
            self._first(kind, grid, rest)
            return
        run, function, metadata, _ = ready
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, driver.get_current_stream(device), function, metadata, None, None, None, *rest, *self._values)

    def _hooked(self) -> bool:
        """Whether somebody watches launches; a chain of hooks may be empty."""
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self._kernel.pre_run_hooks)

    def _first(self, kind, grid, rest):
        compiled = self._kernel[grid](*rest, **self._fixed)
        loaded = isinstance(compiled, triton.compiler.CompiledKernel) and compiled.module is not None
        # Triton checks at each launch that the globals a kernel reads have not changed, so it must see the launches of
        # such a kernel.
        if kind is None or not loaded or self._kernel.used_global_vals or len(rest) != self._count:
            return
        if compiled.metadata.target.backend == ("hip" if _HIP else "cuda"):  # others may specialise on more
            _put(_ready, kind, (compiled.run, compiled.function, compiled.packed_metadata, compiled))


def launch(kernel, grid, *args, **constexprs):
    """Launch on the current device and stream.

    Equivalent to: kernel[grid](*args, **constexprs)

    Args:
        grid: 1 to 3 ints.
        args: what the kernel's parameters before its constexprs take.
        constexprs: with num_stages, num_warps and other options among them.
    """
    if type(kernel) is not triton.JITFunction:
        kernel[grid](*args, **constexprs)
        return
    # An entry keeps its kernel, so that no other has the same address. 1, 1.0 and True are equal but make different
    # kernels.
    values = constexprs.values()
    key = (id(kernel), *constexprs, *values, *map(type, values))
    prepared = _prepared.get(key)
    if prepared is None:
        if any(
            p.name in constexprs and not p.is_constexpr for p in kernel.params
        ):  # a tensor or float, which no entry may keep
            kernel[grid](*args, **constexprs)
            return
        prepared = _Prepared(kernel, **constexprs)
        _put(_prepared, key, prepared)
    prepared(grid, *args)
