"""Back ends that are broken on purpose, each in one way, for who tests that they are caught; importing registers them.

Each is the PyTorch composition but for its fault, and has the modules' form of `fused_lora.backends`.
"""

import os
import signal
import sys
import time
from types import ModuleType

import torch

from fused_lora.ops import checks, reference

_turn, _NAMES = [0], []


def _off_by_one_element(out):
    out[0].view(-1)[-1] += 1
    return out


def _gradient_off(grads):
    grads.lora_A.view(-1)[0] += 1
    return grads


def _no_element_at_the_end(out):
    y = torch.empty(out[0].shape, dtype=out[0].dtype)
    y.view(-1)[:-1] = out[0].view(-1)[:-1]
    return y, out[1]


def _another_each_time(out):
    _turn[0] += 1
    out[0].view(-1)[0] -= out[0].view(-1)[0].frac() * (_turn[0] % 2) * 1e-5  # leaves integers alone
    return out


def _raises(out):
    raise RuntimeError("no kernel image\n  is available")


def _crashes(out):
    os.kill(os.getpid(), signal.SIGSEGV)


def _exits(out):
    print("the driver has said goodbye", file=sys.stderr)
    os._exit(3)


def _hangs(out):
    while True:
        time.sleep(1)


def _talks(out):
    os.write(1, b"debugging output\n")  # past Python's own standard output
    return out


def _masks_as_another_seed(x, weight, A, B, bias, scaling, dropout_p, seed, *rest):
    return reference.forward(x, weight, A, B, bias, scaling, dropout_p, None if seed is None else seed + 1, *rest)


def _register(name, forward=lambda out: out, backward=lambda grads: grads, whole_forward=None):
    module = ModuleType(f"fused_lora.backends.{name}")
    module.forward = whole_forward or (lambda *given: forward(reference.forward(*given)))
    module.backward = lambda *given: backward(reference.backward(*given))
    module.refusal, module.plans = reference.refusal, reference.plans
    module.summary = reference.summary
    sys.modules[module.__name__] = module
    _NAMES.append(name)


_register("wrong", forward=_off_by_one_element)
_register("wrong_gradient", backward=_gradient_off)
_register("wrong_mask", whole_forward=_masks_as_another_seed)
_register("unwritten", forward=_no_element_at_the_end)
_register("fickle", forward=_another_each_time)
_register("raises", forward=_raises)
_register("crashes", backward=_crashes)
_register("exits", forward=_exits)
_register("hangs", backward=_hangs)
_register("talks", forward=_talks)


def announce():
    """Let `lora_linear` take their names, for a process of its own."""
    checks.NAMES = (*checks.NAMES, *_NAMES)
