"""The checks of test_triton_launch.py: launch reaches Triton's launcher with what kernel[grid](...) reaches it with.

A fake driver stands in for a GPU: kernels are compiled for one, and the launcher writes down its arguments. Run as a
script, this file makes the checks and prints what failed: in a process of its own, since the tests' own may have chosen
the interpreter or have a real GPU.
"""

import functools
import gc
import json
import traceback
import weakref

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.triton_kernels.launch import Launcher, launch

GLOBAL = tl.constexpr(1)


@triton.jit
def scale_kernel(x, tiles, bias, n, factor, seed, flag, out, SIZE: tl.constexpr, NAME: tl.constexpr):
    """out [SIZE] = x * factor + bias + seed + flag * n + the sum of a tile: every kind of argument that our kernels
    have, and a bool."""
    offs = tl.arange(0, SIZE)
    value = tl.load(x + offs) * factor + tl.load(seed)
    if bias is not None:
        value += tl.load(bias + offs)
    if tiles is not None:
        value += tl.sum(tiles.load([0, 0]).to(tl.float32))
    if flag:
        value += n
    tl.store(out + offs, value.to(out.dtype.element_ty))


@triton.jit
def global_kernel(out, value):
    tl.store(out, value + GLOBAL)


class FakeDriver:
    """What JITFunction.run asks of a driver; the driver is its own `utils`."""

    def __init__(self):
        self.utils, self.device, self.stream, self.loaded, self.calls = self, 0, 77, 0, []
        self.target = GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream + device

    def get_current_target(self):
        return self.target

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name, binary, shared, device):
        self.loaded += 1
        return object(), self.loaded, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, loaded):
        pass

    def launcher_cls(self, src, metadata):
        def record(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)
            self.calls.append(((x, y, z, stream, function, packed), args))

        return record


def arguments(**changes) -> tuple[list, dict]:
    """Positional and keyword arguments of scale_kernel, with fresh tensors."""
    x, out = torch.empty(2, 64, dtype=torch.float16)
    names = {
        "x": x,
        "tiles": None,
        "bias": None,
        "n": 17,
        "factor": 0.5,
        "seed": torch.tensor(3),
        "flag": True,
        "out": out,
    }
    keywords = {"SIZE": 64, "NAME": "a", "num_stages": 3, "num_warps": 4} | changes
    return [keywords.pop(name, value) for name, value in names.items()], keywords


def tiles(rows=32, block=(16, 32), dtype=torch.float16):
    return TensorDescriptor.from_tensor(torch.empty(rows, 64, dtype=dtype), list(block))


PLAIN_VALUES = [("n", n) for n in (17, 19, 0, 1, True, 1.0, 16, -1, 2**31 - 1, 2**31, 2**31 + 1, 2**63)]
PLAIN_VALUES += [("factor", 0.25), ("factor", 1), ("flag", False), ("SIZE", 32), ("NAME", "b"), ("NAME", 1)]
PLAIN_VALUES += [("num_warps", 2), ("num_stages", 2), ("maxnreg", 64)]
VARIANTS = {f"{name} = {value}": functools.partial(dict, **{name: value}) for name, value in PLAIN_VALUES} | {
    "float32": lambda: {"x": torch.empty(64)},
    "misaligned": lambda: {"x": torch.empty(72, dtype=torch.float16)[1:65]},
    "aligned view": lambda: {"x": torch.empty(72, dtype=torch.float16)[8:]},
    "parameter": lambda: {"x": torch.nn.Parameter(torch.empty(64, dtype=torch.float16))},
    "bias": lambda: {"bias": torch.empty(64, dtype=torch.float16)},
    "seed of 32 bits": lambda: {"seed": torch.tensor(3, dtype=torch.int32)},
    "tiles": lambda: {"tiles": tiles()},
    "more rows": lambda: {"tiles": tiles(rows=48)},
    "other tile": lambda: {"tiles": tiles(block=(32, 16))},
    "float32 tiles": lambda: {"tiles": tiles(dtype=torch.float32)},
}


def run_plain(grid, args, keywords):
    scale_kernel[grid](*args, **keywords)


def run_launch(grid, args, keywords):
    launch(scale_kernel, grid, args, keywords)


def run_by(launcher: Launcher):
    """run_launch by another launcher than the package's."""
    return lambda grid, args, keywords: launcher.launch(scale_kernel, grid, args, keywords)


def recorded(driver, run, *args):
    driver.calls.clear()
    run(*args)
    assert len(driver.calls) == 1
    return driver.calls.pop()


def same(a, b) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor | TensorDescriptor) and a == b)


def assert_as_triton(driver, names, rounds=3, run=run_launch):
    """For each variant, with new tensors each time, the launcher sees what it sees from Triton."""
    for _ in range(rounds):
        for name in names:
            for grid in ((5,), (5, 6), (5, 6, 7)):
                args, keywords = arguments(**VARIANTS[name]())
                (head, expected), (our_head, ours) = (
                    recorded(driver, f, grid, args, keywords) for f in (run_plain, run)
                )
                assert our_head == head, f"{name}: grid, stream, function or metadata {our_head}, not {head}"
                assert len(ours) == len(expected) and all(map(same, ours, expected)), f"{name}: {ours}, not {expected}"


def without_triton(run):
    """run(), in which no launch may go through Triton."""

    def refuse(*args, **kwargs):
        raise AssertionError("the launch went through Triton")

    original = triton.JITFunction.run
    triton.JITFunction.run = refuse
    try:
        run()
    finally:
        triton.JITFunction.run = original


def check_same_as_triton(driver):
    assert_as_triton(driver, VARIANTS)


def check_later_launches_are_direct(driver):
    for change in VARIANTS.values():
        run_launch((1,), *arguments(**change()))
        without_triton(lambda: run_launch((2, 3), *arguments(**change())))


def check_device_and_stream(driver):
    run_launch((1,), *arguments())
    for driver.device, driver.stream in ((1, 77), (0, 5), (1, 5), (0, 77)):
        assert_as_triton(driver, ["n = 17"], rounds=2)


def check_storage_of_2_gib_on_amd(driver):
    """There Triton also specialises on the size of a tensor's storage."""
    driver.device, driver.target = 2, GPUTarget("hip", "gfx942", 64)
    run = run_by(Launcher(hip=True))
    huge = torch.empty(2**30, dtype=torch.float16)  # untouched, hence no memory
    VARIANTS["huge"] = lambda: {"x": huge[:64]}
    try:
        assert_as_triton(driver, ["n = 17", "huge"], run=run)
        functions = {recorded(driver, run, (1,), *arguments(**VARIANTS[name]()))[0][4] for name in ("n = 17", "huge")}
        assert len(functions) == 2
    finally:
        del VARIANTS["huge"]
        driver.device, driver.target = 0, GPUTarget("cuda", 90, 32)


def check_hooks_see_every_launch(driver):
    run_launch((1,), *arguments())
    seen = []
    hook = triton.knobs.runtime.launch_enter_hook

    def enter(metadata):
        seen.append(metadata.get()["name"])

    hook.add(enter)
    try:
        for _ in range(2):
            run_launch((1,), *arguments())
    finally:
        hook.remove(enter)
    assert seen == ["scale_kernel"] * 2
    without_triton(lambda: run_launch((1,), *arguments()))


def check_changed_global_is_refused(driver):
    global GLOBAL
    out = torch.empty(1)
    for _ in range(2):
        launch(global_kernel, (1,), (out, 0.5), {})
    GLOBAL = tl.constexpr(2)
    with pytest.raises(RuntimeError, match="GLOBAL has changed"):
        launch(global_kernel, (1,), (out, 0.5), {})


def check_unusual_calls(driver):
    """Constexprs by position, parameters by keyword, constexprs that differ in name or type alone: as in Triton."""
    for factor in (0.5, 0.25):
        for name in ("c", 0.5, 0.25):
            args, _ = arguments(factor=factor)
            call = recorded(driver, run_launch, (1,), [*args, 64, name], {"num_warps": 4})
            assert call == recorded(driver, run_plain, (1,), [*args, 64, name], {"num_warps": 4})
            args, keywords = arguments()
            keywords |= dict(zip(("factor", "seed", "flag", "out"), (factor, *args[5:]), strict=True))
            call = recorded(driver, run_launch, (1,), args[:4], keywords)
            assert call == recorded(driver, run_plain, (1,), args[:4], keywords)
    for name, x in ((1, torch.empty(64)), (True, torch.empty(64, dtype=torch.bfloat16))):
        assert recorded(driver, run_launch, (1,), *arguments(NAME=name, x=x))[1][-1] is name
    args, _ = arguments()
    for options in ({"num_stages": 2, "num_warps": 4}, {"num_warps": 2, "num_stages": 4}):
        call = recorded(driver, run_launch, (1,), args, {"SIZE": 64, "NAME": "a"} | options)
        assert call[0] == recorded(driver, run_plain, (1,), args, {"SIZE": 64, "NAME": "a"} | options)[0]
    for _ in range(2):
        with pytest.raises(TypeError):
            launch(scale_kernel, (1,), args[:1], keywords)


def check_no_tensor_is_kept(driver):
    for change in (dict, lambda: {"tiles": tiles()}):
        args, keywords = arguments(**change())
        kept = [weakref.ref(a) for a in args if isinstance(a, torch.Tensor | TensorDescriptor)]
        run_launch((1,), args, keywords)
        run_launch((1,), args[:-1], keywords | {"out": args[-1]})
        driver.calls.clear()
        del args
        gc.collect()
        assert kept and not any(ref() is not None for ref in kept)


def check_bounded(driver):
    launcher = Launcher(most=3)
    run = run_by(launcher)
    for n in range(33, 63, 2):
        assert_as_triton(driver, ["n = 17", "NAME = b", "SIZE = 32", "bias"], rounds=1, run=run)
        run((1,), *arguments(n=n))
        assert 0 < len(launcher.ready) <= 3 and 0 < len(launcher.prepared) <= 3


def check_unknown_release(driver):
    """Nothing direct where Triton's launch may be another."""
    run = run_by(Launcher(direct=False))
    for _ in range(2):
        run((1,), *arguments())
    with pytest.raises(AssertionError, match="through Triton"):
        without_triton(lambda: run((1,), *arguments()))


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


if __name__ == "__main__":
    fake, results = FakeDriver(), {}
    triton.runtime.driver.set_active(fake)
    for name, check in CHECKS.items():
        launch = Launcher().launch  # which has seen no launch
        try:
            results[name] = check(fake)
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
    print(json.dumps(results))
