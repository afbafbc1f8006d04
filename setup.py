"""Builds fused_lora._C with ninja: C++ sources always, CUDA sources when nvcc is found.

Environment: FUSED_LORA_CUDA=auto|0|1 (1 without nvcc is an error), FUSED_LORA_CUDA_ARCHS="90a;100a", CUDA_HOME,
    FUSED_LORA_PTXAS (an assembler in place of the toolkit's), FUSED_LORA_SPIN_LIMIT (turns after which a wait in a CUDA
    kernel says where it stands and ends the kernel: to look for hangs), CXX, MAX_JOBS.
Torch is not needed here: the extension knows no torch type.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/fused-lora/fused-lora"
# Contraction gives FMAs; no errno and no trapping maths let loops vectorise. Nothing here relaxes NaN or infinity.
# NDEBUG drops pybind11's asserts, which cost time at each call and put the path of its headers into the library.
CXXFLAGS = (
    "-std=c++20 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi"
)
NVCCFLAGS = "-std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
LIBRARIES = "-ldl -lpthread"
# ptxas before this release may miscompile pipelined wgmma, of which the kernels for sm_90a consist.
SOUND_PTXAS = (13, 3)
# CUDA's name for a machine, where its toolkit keeps one folder a target.
CUDA_TARGETS = {"x86_64": ["x86_64-linux"], "aarch64": ["sbsa-linux", "aarch64-linux"]}


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
        if home:
            raise SystemExit(
                f"CUDA_HOME must be a CUDA toolkit; got {home}, which has no bin/nvcc "
                "(FUSED_LORA_CUDA=0 builds without CUDA)"
            )
        if want == "1":
            raise SystemExit(
                f"FUSED_LORA_CUDA=1 needs nvcc, and there is none on PATH or at {nvcc}; "
                "install the CUDA toolkit or set CUDA_HOME"
            )
        return None
    # nvcc on PATH may be a wrapper script or a link: ask it where its toolkit lies.
    out = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    ).stderr
    top = next((line.split("TOP=", 1)[1].strip() for line in out.splitlines() if "TOP=" in line), None)
    return Path(top).resolve() if top else nvcc.resolve().parent.parent


def cuda_archs() -> list[str]:
    """The targets of the CUDA sources. The compiled kernels are Hopper's; Triton's serve every other GPU."""
    archs = os.environ.get("FUSED_LORA_CUDA_ARCHS", "90a").split(";")
    if not all(re.fullmatch(r"\d+[af]?", arch) for arch in archs):
        raise SystemExit(f"FUSED_LORA_CUDA_ARCHS must look like 90a or 90a;100a; got {';'.join(archs)!r}")
    return archs


def ptxas_release(ptxas: Path) -> str:
    """The release of an assembler, such as 13.3, said aloud; with a warning, here and in what is returned, which
    `fused-lora info` shows, if it is one to beware of: pip hides what a build prints."""
    try:
        out = subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        out = str(error)
    found = re.search(r"release (\d+)\.(\d+)", out)
    if not found:
        raise SystemExit(f"{ptxas} must be an assembler that tells its release; it says {out.strip()!r}")
    release, archs = f"{found[1]}.{found[2]}", cuda_archs()
    print(f"fused-lora: CUDA kernels for {', '.join(archs)}, assembled by ptxas {release}")
    if "90a" in archs and (int(found[1]), int(found[2])) < SOUND_PTXAS:
        sound = ".".join(map(str, SOUND_PTXAS))
        print(
            f"fused-lora: warning: ptxas {release} may miscompile kernels for sm_90a, {sound} and newer don't; set "
            "FUSED_LORA_PTXAS, see docs/install.md",
            file=sys.stderr,
        )
        return f"{release}, which may miscompile: see docs/install.md"
    return release


def nvcc_with_ptxas(cuda: Path, ptxas: Path, folder: Path) -> Path:
    """The toolkit's nvcc under a path in `folder` where it finds another assembler first: nvcc has no option for that,
    but reads its settings from where it was called."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    profile = (cuda / "bin/nvcc.profile").read_text().replace("$(_HERE_):", f"{folder}:$(TOP)/bin:")
    (folder / "nvcc.profile").write_text(re.sub(r"(?m)^TOP\s*=.*", lambda _: f"TOP = {cuda}", profile))
    (folder / "nvcc").symlink_to(cuda / "bin/nvcc")
    (folder / "ptxas").symlink_to(ptxas.resolve())
    return folder / "nvcc"


def cudart_folder(cuda: Path) -> Path:
    """The folder of the static CUDA runtime, which adds no library to load."""
    targets = [f"targets/{name}/lib" for name in CUDA_TARGETS.get(platform.machine(), [])]
    for name in ("lib64", "lib", *targets):
        if (cuda / name / "libcudart_static.a").exists():
            return cuda / name
    raise SystemExit(
        f"the CUDA toolkit at {cuda} must hold libcudart_static.a; looked in {', '.join(('lib64', 'lib', *targets))} "
        "(install the CUDA runtime's development files, or build without CUDA: FUSED_LORA_CUDA=0)"
    )


def sources(cuda: Path | None) -> list[Path]:
    """Everything to compile, relative to the repository. The heuristics are host code and in every build."""
    csrc = ROOT / "csrc"
    found = [*csrc.glob("*.cpp"), *(csrc / "cpu").rglob("*.cpp")]
    found += (csrc / "cuda").rglob("*.c*" if cuda else "*heuristics.cpp")
    return sorted(f.relative_to(ROOT) for f in found if f.suffix in (".cpp", ".cu"))


def escape(path: Path | str) -> str:
    """A path in a build line of ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def command(line: str) -> str:
    """A shell command in a rule of ninja, but for {} around ninja's own variables."""
    return line.replace("$", "$$").replace("{in}", "$in").replace("{out}", "$out")


def host_compiler(cxx: str) -> str:
    """nvcc's -ccbin, one program, of a compiler that is called through ccache or with flags."""
    words = shlex.split(cxx)
    programs = [word for word in words if Path(word).name not in ("ccache", "sccache", "distcc")]
    return shlex.quote(programs[0] if programs else words[0])


def spin_limit() -> str:
    """nvcc's flag for FUSED_LORA_SPIN_LIMIT, none where it isn't given."""
    limit = os.environ.get("FUSED_LORA_SPIN_LIMIT", "")
    if limit and not re.fullmatch("[1-9][0-9]*", limit):
        raise SystemExit(f"FUSED_LORA_SPIN_LIMIT must be a whole number of turns; got {limit!r}")
    return f" -DFUSED_LORA_SPIN_LIMIT={limit}" if limit else ""


def build_ninja(folder: Path, library: Path, headers: Path, cuda: Path | None) -> str:
    """The text of build.ninja. Ninja runs in the repository and paths below it are relative, so that what a C++
    compiler writes does not depend on where that is (nvcc names its symbols by the absolute path)."""
    cxx = os.environ.get("CXX", "c++")
    quote = shlex.quote
    flags = f"{CXXFLAGS} -Icsrc -I{quote(str(headers))} -I{quote(sysconfig.get_paths()['include'])}"
    libraries = LIBRARIES
    rules = []
    if cuda:
        archs = cuda_archs()
        given = os.environ.get("FUSED_LORA_PTXAS")
        release = ptxas_release(Path(given or cuda / "bin/ptxas"))
        program = nvcc_with_ptxas(cuda, Path(given), (ROOT / folder / "nvcc").resolve()) if given else cuda / "bin/nvcc"
        defines = (f'-DFUSED_LORA_CUDA_ARCHS="{";".join(archs)}"', f'-DFUSED_LORA_PTXAS="{release}"')
        flags += f" -DFUSED_LORA_CUDA {' '.join(map(quote, defines))} -I{quote(str(cuda / 'include'))}"
        libraries = f"-L{quote(str(cudart_folder(cuda)))} -lcudart_static -lrt {LIBRARIES}"
        targets = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        nvcc = f"{quote(str(program))} -ccbin {host_compiler(cxx)} {NVCCFLAGS}{spin_limit()} -Icsrc {targets}"
        rules += [("nvcc", f"{nvcc} -MMD -MF {{out}}.d -c {{in}} -o {{out}}", True)]
    rules += [("cxx", f"{cxx} {flags} -MMD -MF {{out}}.d -c {{in}} -o {{out}}", True)]
    rules += [("link", f"{cxx} -shared -Wl,--gc-sections -s {{in}} -o {{out}} {libraries}", False)]
    lines = [f"builddir = {escape(folder)}"]
    for name, line, has_depfile in rules:
        lines += [f"rule {name}", f"  command = {command(line)}"]
        lines += ["  depfile = $out.d", "  deps = gcc"] if has_depfile else []
    objects = []
    for source in sources(cuda):
        objects.append(escape(folder / f"{source}.o"))
        lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {escape(source)}")
    lines.append(f"build {escape(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def from_root(path: Path) -> Path:
    """The path as seen from the repository, if it lies there."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def pybind11_headers(folder: Path) -> Path:
    """A copy of pybind11's headers in the build folder: pip builds in an environment whose path is new at each run,
    which would recompile what includes them."""
    copy = folder / f"pybind11-{pybind11.__version__}"
    if not (ROOT / copy).exists():
        partial = ROOT / folder / "pybind11-partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(ROOT / copy)
    return copy


class NinjaBuild(build_ext):
    """One build.ninja for the whole extension: all files compile in parallel and rebuilds are incremental."""

    def build_extension(self, ext):
        if sys.platform != "linux":
            raise SystemExit(
                f"fused-lora builds on Linux only; this is {platform.system()} (on Windows, use the Linux subsystem)"
            )
        cuda = cuda_home()
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        # setuptools gives an editable build a new folder at each run, and nothing in it to reuse.
        base = ROOT / "build" / f"editable-{sys.implementation.cache_tag}" if self.editable_mode else self.build_temp
        folder = from_root(Path(base, "cuda" if cuda else "cpu"))
        for parent in (ROOT / folder, out.parent):
            parent.mkdir(parents=True, exist_ok=True)
        library = folder / out.name
        (ROOT / folder / "build.ninja").write_text(build_ninja(folder, library, pybind11_headers(folder), cuda))
        # The same ninja in pip's isolated environment and out of it: another release does not read the log of this one.
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([*ninja, "-C", str(ROOT), "-f", str(folder / "build.ninja"), *jobs]).returncode:
            raise SystemExit(
                f"fused_lora._C did not build ({'with' if cuda else 'without'} CUDA); the compiler's message is above"
            )
        self.copy_file(str(ROOT / library), str(out))


def readme() -> str:
    """README.md for the package index, where a link relative to the repository leads nowhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!\w+:|#)", rf"\1{REPOSITORY}/blob/main/", text)


if __name__ == "__main__":
    setup(
        long_description=readme(),
        long_description_content_type="text/markdown",
        packages=[*find_packages(str(ROOT / "src")), "fused_lora.triton_kernels"],
        package_dir={"": "src", "fused_lora.triton_kernels": "triton_kernels"},
        package_data={"fused_lora": ["py.typed"]},
        ext_modules=[Extension("fused_lora._C", [])],
        cmdclass={"build_ext": NinjaBuild},
    )
