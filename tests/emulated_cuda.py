"""Builds the CUDA sources as C++ for the emulated GPU of native/cuda_emulator."""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "native" / "cuda_emulator"
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"

# Every store of a kernel through a pointer calls a function of cuda_emulator/shadow.cpp.
REPORTED_STORES = ["-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0"]
REPORTED_STORES += [f"--param=asan-{what}=0" for what in ("stack", "globals", "instrument-reads")]


def compile_file(source: Path, file: Path, optimise: str = "-O2") -> Path:
    """One C++ or CUDA source as an object beside it; `source` is the csrc folder that it includes from."""
    includes = [HERE / "include", HERE, source, TOOLKIT, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [
        "-std=c++20",
        optimise,
        "-fPIC",
        "-fvisibility=hidden",
        "-w",
        "-DFUSED_LORA_CUDA",
        '-DFUSED_LORA_CUDA_ARCHS="emulated"',
        '-DFUSED_LORA_PTXAS="none"',
        "-D__launch_bounds__(...)=",
        *(REPORTED_STORES if file.suffix == ".cu" else []),
    ]
    done = subprocess.run(
        ["c++", *flags, *(f"-I{i}" for i in includes), "-x", "c++", "-c", str(file), "-o", f"{file}.o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{file}\n{done.stderr[-4000:]}"
    return Path(f"{file}.o")


def build(folder: Path) -> Path:
    """The extension for the emulated device, linked in `folder` from a copy of the sources."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    for name in ("ptx.cuh", "device.cpp", "shadow.cpp"):
        shutil.copy(HERE / name, source / "cuda" / name)
    files = sorted(source.rglob("*.cu")) + sorted(source.rglob("*.cpp"))
    # The CPU's kernels and pybind11's templates take longest to compile, and hardly run here.
    level = lambda file: "-O0" if file.parent.name == "cpu" or "bindings" in file.name else "-O2"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda file: compile_file(source, file, level(file)), files))
    return link(folder)


def link(folder: Path) -> Path:
    library = folder / "_C.so"
    subprocess.run(
        ["c++", "-shared", *map(str, sorted((folder / "csrc").rglob("*.o"))), "-o", str(library), "-lpthread"],
        check=True,
    )
    return library


def build_bringup(source: Path, folder: Path) -> Path:
    """bench/bringup's program, compiled in `folder` if it is not there yet, over the objects of `source`, a csrc folder
    that is built; beside that folder."""
    files = [folder / file.name for file in sorted((ROOT / "bench" / "bringup").iterdir())]
    if not files[0].exists():
        for file in files:
            shutil.copy(ROOT / "bench" / "bringup" / file.name, file)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda file: compile_file(source, file), [f for f in files if f.suffix == ".cpp"]))
    own = [f"{file}.o" for file in files if file.suffix == ".cpp"]
    objects = [str(o) for o in (source / "cuda").rglob("*.o") if not o.name.startswith("bindings")]
    program = source.parent / "bringup"
    subprocess.run(["c++", *own, *objects, "-o", str(program), "-lpthread"], check=True)
    return program
