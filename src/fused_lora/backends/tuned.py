"""What `fused-lora tune` has found out on this machine: one JSON file a device in the user's cache directory.

The file counts only for the very environment in which it was written (`environment`). It is read once, when
backend="auto" first asks for its device; on a CPU once for each number of threads, and what was picked for a request
with one number stays for another. FUSED_LORA_TUNED=0 ignores it; FUSED_LORA_CACHE names another directory.
"""

import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_lora import _C
from fused_lora.hardware import cpu_features, cpu_name, gpu_driver, gpu_name


class Shape(NamedTuple):
    """What a verdict is for."""

    dtype: str
    adapter_dtype: str
    M: int
    N: int
    K: int
    R: int


@dataclass
class Verdict:
    """What was found out of one shape: microseconds of the candidates ("cpu:inside") that are right, the fastest first,
    and who failed."""

    times: dict[str, float] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()


@dataclass
class Tuned:
    """The file of a device, and what it says; `ignored` is the reason why it says nothing, or empty."""

    path: Path
    ignored: str = ""
    document: dict = field(default_factory=dict)
    verdicts: dict[Shape, Verdict] = field(default_factory=dict)


def directory() -> Path:
    """$FUSED_LORA_CACHE, else fused-lora in $XDG_CACHE_HOME, else in ~/.cache."""
    own, xdg = os.environ.get("FUSED_LORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(xdg or os.path.expanduser("~/.cache"), "fused-lora")


def switched_off() -> bool:
    """Whether the environment says to ignore every file."""
    return os.environ.get("FUSED_LORA_TUNED", "1") == "0"


def path_of(device: torch.device) -> Path:
    """The file of a device: named by it and, for a CPU, by the number of threads, which decides like the device."""
    name = f"cpu {cpu_name()} {torch.get_num_threads()}" if device.type == "cpu" else gpu_name(device)
    return directory() / f"tuned-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a verdict depends on: device, driver, versions, and the kernels byte for byte."""
    on_cpu = device.type == "cpu"
    return dict(
        device=cpu_name() if on_cpu else gpu_name(device),
        threads=torch.get_num_threads() if on_cpu else 0,
        features=cpu_features() if on_cpu else {},
        driver="" if on_cpu else gpu_driver(),
        torch=torch.__version__,
        triton=_version("triton"),
        fused_lora=_version("fused-lora"),
        compiler=_C.build_info()["compiler"],
        kernels=_kernels(),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def _kernels() -> str:
    """A hash over the compiled part and the sources of the Triton kernels."""
    found = importlib.util.find_spec("fused_lora.triton_kernels")
    folders = (found.submodule_search_locations if found else None) or []
    files = [Path(_C.__file__), *sorted(file for folder in folders for file in Path(folder).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def load(device: torch.device) -> Tuned:
    """What the file of a device says. A damaged one is ignored with a warning, never an error."""
    return _loaded(device, torch.get_num_threads())


@functools.cache
def _loaded(device: torch.device, threads: int) -> Tuned:
    return Tuned(directory(), "FUSED_LORA_TUNED is 0") if switched_off() else read(device)


def forget() -> None:
    """Read the files anew next time."""
    _loaded.cache_clear()


def read(device: torch.device) -> Tuned:
    """The same, whether it counts or is switched off."""
    if not directory().is_dir():
        return Tuned(directory(), "there is none")
    path = path_of(device)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        here, there = environment(device), document["environment"]
        for name, value in here.items():
            if there.get(name) != value:
                return Tuned(path, f"{name} was {there.get(name)!r}, is {value!r}", document)
        return Tuned(path, "", document, verdicts(document["rows"]))
    except FileNotFoundError:
        return Tuned(path, "there is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path} is ignored, it is no file of `fused-lora tune` ({reason})", stacklevel=2)
        return Tuned(path, f"damaged ({reason})")


def verdicts(rows: list[dict]) -> dict[Shape, Verdict]:
    """The verdict of each shape from its rows, with and without dropout: what failed in one of them has failed, and the
    fastest has the smallest sum.

    Raises: ValueError, KeyError, TypeError or AttributeError for rows of another make.
    """
    by_shape: dict[Shape, list[dict]] = {}
    for row in rows:
        by_shape.setdefault(shape_of(row), []).append(row["candidates"])
    return {shape: _verdict(found) for shape, found in by_shape.items()}


def shape_of(row: dict) -> Shape:
    """The shape that a row is of."""
    shape = Shape(str(row["dtype"]), str(row["adapter_dtype"]), *(int(row[name]) for name in "MNKR"))
    if min(shape[2:]) < 1:
        raise ValueError(f"sizes must be 1 or more; got {shape[2:]}")
    return shape


def _verdict(rows: list) -> Verdict:
    failed = frozenset(name for row in rows for name, figures in row.items() if "fault" in figures)
    everywhere = [name for name in rows[0] if name not in failed and all("us" in row.get(name, ()) for row in rows)]
    times = {name: sum(float(row[name]["us"]) for row in rows) for name in everywhere}
    return Verdict(dict(sorted(times.items(), key=lambda pair: pair[1])), failed)


def choose(request, willing: tuple[str, ...]) -> str:
    """The candidate that serves a request under backend="auto".

    Where the request's own shape was tuned, or one near it, that verdict holds: the fastest that is right there. Near
    is: the same dtypes, R in the same power of two, and M, N and K within a factor of 2 each, the nearest of them by
    the sum of these factors' logarithms. Beyond that a time says little, so the safe order decides; but what has failed
    at any shape of the same dtypes serves none that was not tuned.

    Args:
        request: a `backends.Request`.
        willing: candidates that can serve it, in the order that holds without a file; the last one is the last resort.
    """
    tuned = load(request.device)
    verdict = _nearest(tuned.verdicts, request) if tuned.verdicts and not request.optional else None
    if verdict is None:
        return willing[0]
    for name in (*verdict.times, *willing):
        if name in willing and name not in verdict.failed:
            return name
    return willing[-1]


def _nearest(found: dict[Shape, Verdict], request) -> Verdict:
    dtypes = (str(request.dtype)[6:], str(request.adapter_dtype)[6:])
    sizes = (request.M, request.N, request.K)
    own = found.get(Shape(*dtypes, *sizes, request.R))
    if own is not None:
        return own
    near: list[tuple[float, Verdict]] = []
    failed: frozenset[str] = frozenset()
    for shape, verdict in found.items():
        if shape[:2] != dtypes:
            continue
        failed |= verdict.failed
        apart = [abs(math.log2(a / b)) if a else math.inf for a, b in zip(sizes, shape[2:5])]
        if max(apart) <= 1 and (shape.R - 1).bit_length() == (request.R - 1).bit_length():
            near.append((sum(apart), verdict))
    return min(near, key=lambda pair: pair[0])[1] if near else Verdict(failed=failed)
