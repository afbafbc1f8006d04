"""Builds fused_lora._C with ninja: C++ sources always, CUDA sources when nvcc is found.

Environment: FUSED_LORA_CUDA=auto|0|1 (1 without nvcc is an error), FUSED_LORA_CUDA_ARCHS="80;90a", CUDA_HOME, CXX,
    MAX_JOBS.
Torch is not needed here: the extension knows no torch type.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# fp contraction gives FMAs; no errno and no trapping maths let loops vectorise. Nothing here relaxes NaN or infinity.
CXXFLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi"
)
NVCCFLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, or None for a build without CUDA."""
    want = os.environ.get("FUSED_LORA_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"FUSED_LORA_CUDA must be auto, 0 or 1; got {want!r}")
    if want == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if not nvcc.exists():
        if want == "1":
            raise SystemExit(
                f"FUSED_LORA_CUDA=1 needs nvcc, and there is none at {nvcc}; install the CUDA toolkit or set CUDA_HOME"
            )
        return None
    # nvcc on PATH may be a wrapper script or a link: ask it where its toolkit lies.
    out = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    ).stderr
    top = next((line.split("TOP=", 1)[1].strip() for line in out.splitlines() if "TOP=" in line), None)
    return Path(top).resolve() if top else nvcc.resolve().parent.parent


def gencode() -> list[str]:
    """One machine-code target per entry of FUSED_LORA_CUDA_ARCHS."""
    archs = os.environ.get("FUSED_LORA_CUDA_ARCHS", "80;90a").split(";")
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]


def ninja_command() -> list[str]:
    ninja = shutil.which("ninja")
    return [ninja] if ninja else [sys.executable, "-m", "ninja"]


class NinjaBuild(build_ext):
    """Writes one build.ninja for the whole extension, so that all files compile in parallel and rebuilds are
    incremental."""

    def build_extension(self, ext):
        cuda = cuda_home()
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        tmp = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        out.parent.mkdir(parents=True, exist_ok=True)
        tmp.mkdir(parents=True, exist_ok=True)
        includes = [str(ROOT / "csrc"), pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = CXXFLAGS + "".join(f" -I{shlex.quote(i)}" for i in includes)
        cxx = os.environ.get("CXX", "c++")
        sources = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        sources += (
            sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
            if cuda
            else sorted((ROOT / "csrc" / "cuda").glob("*heuristics.cpp"))
        )
        libs = "-ldl -lpthread"
        rules = [
            f"cxx = {cxx}",
            f"flags = {flags}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        if cuda:
            sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            archs = os.environ.get("FUSED_LORA_CUDA_ARCHS", "80;90a")
            rules[1] += f" -DFUSED_LORA_CUDA -DFUSED_LORA_CUDA_ARCHS='\"{archs}\"' -I{cuda}/include"
            nvflags = f"{NVCCFLAGS} -I{ROOT / 'csrc'} {' '.join(gencode())}"
            rules += [
                "rule nvcc",
                f"  command = {cuda}/bin/nvcc -ccbin $cxx -MMD -MF $out.d {nvflags} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            libdir = next(
                d
                for d in (cuda / "lib64", cuda / "lib", cuda / "targets/x86_64-linux/lib")
                if (d / "libcudart_static.a").exists()
            )
            libs = f"-L{libdir} -lcudart_static -lrt {libs}"
        objects = [tmp / (str(s.relative_to(ROOT / "csrc")).replace("/", "_") + ".o") for s in sources]
        rules += ["rule link", f"  command = $cxx -shared -Wl,--gc-sections -s $in -o $out {libs}"]
        rules += [f"build {o}: {'nvcc' if s.suffix == '.cu' else 'cxx'} {s}" for s, o in zip(sources, objects)]
        rules += [f"build {out}: link {' '.join(map(str, objects))}"]
        (tmp / "build.ninja").write_text("\n".join(rules) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([*ninja_command(), "-C", str(tmp), *jobs]).returncode:
            raise SystemExit(
                f"fused_lora._C did not build ({'with' if cuda else 'without'} CUDA); the compiler's message is above"
            )


setup(ext_modules=[Extension("fused_lora._C", [])], cmdclass={"build_ext": NinjaBuild})
