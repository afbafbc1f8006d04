"""How much memory a step needs at its peak: the allocator's on a GPU; on a CPU the resident memory of a process that
does nothing else."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

_MIB = 2**20
# glibc raises the size from which a block is a mapping of its own with every such block that is freed, up to 32 MiB;
# what lies in the heap instead stays resident behind any small block: 100 MiB in one run, none in the next.
_FREED_IS_FREE = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


def model_mib(model: nn.Module) -> float:
    """MiB of the model's parameters and buffers, each storage once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values()) / _MIB


def allocated_mib(step: Callable[[], object]) -> float:
    """MiB that `step` allocates on the GPU at its peak, over what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / _MIB


def resident_mib(step: Callable[[], object]) -> float:
    """MiB by which the resident memory of this process grows at the peak of three steps; call it in a fresh process."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def in_fresh_process(function: Callable[..., float], *arguments: object) -> float:
    """What function(*arguments) gives in a process of its own, which inherits nothing: function and arguments are
    pickled. There a freed tensor's memory goes back to the system at once, so that a peak is what is needed.

    Raises: OSError with the last line of what the process said, if it fails.
    """
    command = [sys.executable, "-c", "from fused_lora.bench.memory import serve; serve()"]
    message, environment = pickle.dumps((function, arguments)), os.environ | _FREED_IS_FREE
    done = subprocess.run(command, input=message, capture_output=True, env=environment)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(f"the process that measures peak memory failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def serve() -> None:
    """The other end of `in_fresh_process`."""
    function, arguments = pickle.load(sys.stdin.buffer)
    print(json.dumps(function(*arguments)))
