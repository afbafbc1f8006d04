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
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# From 3.6 to 3.9 JITFunction.run ends in the call that _Prepared makes, constexprs among the arguments. Read a release
# before adding it.
_KNOWN = (3, 6) <= tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) <= (3, 9)


class Launcher:
    """Launches, and what it remembers of them.

    Args:
        direct: whether later launches of a kind may leave Triton out.
        hip: whether Triton specialises on the size of a tensor's storage.
        most: kinds, after which all are forgotten: ever new sizes must not fill the memory.
    """

    def __init__(self, *, direct: bool = _KNOWN, hip: bool = torch.version.hip is not None, most: int = 4096):
        self.direct, self.hip, self.most = direct, hip, most
        self.ready = {}  # kind: the launcher, function, metadata and compiled kernel, which must outlive its function
        self.prepared = {}  # kernel, constexprs and options: their _Prepared
        self.serials = itertools.count()  # unlike an address, never given twice

    def launch(self, kernel, grid: tuple[int, ...], args: Sequence, constexprs: dict) -> None:
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
        prepared = self.prepared.get(key)
        if prepared is None:
            # A tensor or float among them, which no entry may keep.
            if any(p.name in constexprs and not p.is_constexpr for p in kernel.params):
                kernel[grid](*args, **constexprs)
                return
            prepared = _Prepared(self, kernel, constexprs)
            self.put(self.prepared, key, prepared)
        prepared(grid, args)

    def put(self, cache: dict, key, value) -> None:
        if len(cache) >= self.most:
            cache.clear()
        cache[key] = value


class _Prepared:
    """A kernel with its constexprs and options fixed: prepared(grid, args) passes the parameters before them."""

    def __init__(self, launcher: Launcher, kernel, fixed: dict):
        self.launcher, self.kernel, self.fixed, self.serial = launcher, kernel, fixed, next(launcher.serials)
        self.values = tuple(fixed[name] for name in kernel.arg_names if name in fixed)
        self.count = len(kernel.arg_names) - len(self.values)
        # Constexprs come last and all are given; one among the rest would have to be in the kind with its value,
        # whatever its type.
        self.direct = launcher.direct and {*kernel.constexprs} == {*range(self.count, len(kernel.arg_names))}

    def __call__(self, grid, args):
        if not self.direct or self.hooked():
            self.kernel[grid](*args, **self.fixed)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        kind = _kind([self.serial, device], args, self.launcher.hip)
        ready = self.launcher.ready.get(kind)
        if ready is None:
            self.first(kind, grid, args)
            return
        run, function, metadata, _ = ready
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, driver.get_current_stream(device), function, metadata, None, None, None, *args, *self.values)

    def hooked(self) -> bool:
        """Whether somebody watches launches; a chain of hooks may be empty."""
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self.kernel.pre_run_hooks)

    def first(self, kind, grid, args):
        """Through Triton, whose compiled kernel serves the later launches of the kind."""
        compiled = self.kernel[grid](*args, **self.fixed)
        loaded = isinstance(compiled, triton.compiler.CompiledKernel) and compiled.module is not None
        # Triton checks at each launch that the globals a kernel reads have not changed, so it must see the launches of
        # such a kernel.
        if kind is None or not loaded or self.kernel.used_global_vals or len(args) != self.count:
            return
        launcher = self.launcher
        if compiled.metadata.target.backend == ("hip" if launcher.hip else "cuda"):  # others may specialise on more
            ready = (compiled.run, compiled.function, compiled.packed_metadata, compiled)
            launcher.put(launcher.ready, kind, ready)


def _kind(key: list, args: tuple, hip: bool) -> tuple | None:
    """key with what the compiled kernel may depend on in args; None where Triton must look itself."""
    add = key.append
    for a in args:
        kind = type(a)
        if kind is int or a is None:
            add(a)
        elif isinstance(a, Tensor):
            add(a.dtype)
            add(a.data_ptr() % 16 == 0)
            if hip:
                add(a.untyped_storage().nbytes() < 2**31)
        elif kind is float or kind is bool:
            add(kind)
        elif kind is TensorDescriptor:
            add((a.base.dtype, *a.shape, *a.strides, *a.block_shape))
        else:
            return None
    return tuple(key)


launch = Launcher().launch
