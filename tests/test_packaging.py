"""The package as users meet it: sdist, wheel, what they hold and ask for, the build's switches and refusals."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pybind11
import pytest
from packaging.requirements import Requirement
from setuptools import Distribution

import fused_lora
from fused_lora import _C

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
BUILD = "import sys; sys.modules['torch'] = None; from setuptools import build_meta as b; print(b.{hook}(sys.argv[1]))"
ODD = "a b$c:d"  # a folder whose name ninja and the shell would each read otherwise
# A compiler in name only: it notes its arguments, one call a line, and leaves empty files.
STUB = """#!/bin/sh
call=$(for argument; do printf '%s\\t' "$argument"; done)
printf '%s\\n' "$call" >> '{log}'  # in one write: ninja runs several
while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) depfile=$2;; esac; shift; done
: > "$out"; [ -z "$depfile" ] || : > "$depfile"
"""


def build(hook, source, out, **env):
    """Runs one PEP 517 hook in `source` with torch out of reach; returns the finished process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "FUSED_LORA_CUDA_ARCHS")}
    command = [sys.executable, "-c", BUILD.format(hook=hook), str(out)]
    return subprocess.run(command, cwd=source, env=inherited | env, capture_output=True, text=True)


def compiler(path: Path) -> Path:
    """Writes a stub compiler; its log lies beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB.format(log=path.with_suffix(".log")))
    path.chmod(0o755)
    return path


def assembler(path: Path, release: str = "13.3") -> Path:
    """Writes a stub ptxas of a release."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


def calls(stub: Path) -> list[list[str]]:
    log = stub.with_suffix(".log")
    return [line.split("\t")[:-1] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The archive of a clean copy of the repository."""
    out = tmp_path_factory.mktemp("sdist")
    ignored = (".git", ".venv", "build", "*.so", "*.egg-info", "demo", "__pycache__")
    shutil.copytree(ROOT, out / "source", ignore=shutil.ignore_patterns(*ignored))
    done = build("build_sdist", out / "source", out)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz"))


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as tar:
        # Python 3.11.4 brought the filters; before, extractall() has no such argument.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
    return next(folder.glob("fused_lora-*/"))


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    return unpack(sdist, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def unoptimised(tmp_path_factory):
    """The compiler without optimisation: the wheel holds the same files, and compiles in a third of the time."""
    path = tmp_path_factory.mktemp("unoptimised") / "c++"
    path.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


def build_wheel(sdist, folder, **env):
    """The wheel of the C++ build, made in `folder`; one date for all files, so that bytes can be compared."""
    out, env = folder / "dist", env | {"FUSED_LORA_CUDA": "0", "SOURCE_DATE_EPOCH": "1700000000"}
    done = build("build_wheel", unpack(sdist, folder), out, **env)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(sdist, unoptimised, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel") / ODD
    folder.mkdir()
    return build_wheel(sdist, folder, CXX=unoptimised)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def distribution(unpacked):
    return metadata.PathDistribution(next(unpacked.glob("*.dist-info")))


def files(folder, *suffixes):
    """Files below a folder of the repository, relative to it."""
    return {str(p.relative_to(ROOT / folder)) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}


def test_sdist_holds_what_a_build_needs_and_nothing_else(source):
    expected = {f"csrc/{name}" for name in files("csrc", ".h", ".cuh", ".cpp", ".cu")}
    expected |= {f"src/{name}" for name in files("src", ".py", ".pyi", ".typed")}
    expected |= {f"triton_kernels/{name}" for name in files("triton_kernels", ".py")}
    expected |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    expected |= {"CHANGELOG.md"} & {p.name for p in ROOT.iterdir()}
    written = {"PKG-INFO", "setup.cfg"}  # by setuptools, with the egg-info
    held = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and ".egg-info" not in str(p)}
    assert held == expected | written


def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {f"fused_lora/{name}" for name in files("src/fused_lora", ".py", ".pyi", ".typed")}
    expected |= {f"fused_lora/triton_kernels/{name}" for name in files("triton_kernels", ".py")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {name for name in held if re.fullmatch(r"fused_lora/_C\.[^/]*\.so", name)}
    assert len(library) == 1 and held == expected | library
    assert "fused_lora/py.typed" in held and "fused_lora/triton_kernels/__init__.py" in held


def test_wheel_does_not_depend_on_the_folder_it_is_built_in(sdist, wheel, unoptimised, tmp_path):
    """Nor on where pip's isolated environment has pybind11, whose asserts hold the path of its headers."""
    shutil.copytree(Path(pybind11.get_include()).parent, tmp_path / "elsewhere/pybind11")
    again = build_wheel(sdist, tmp_path, CXX=unoptimised, PYTHONPATH=str(tmp_path / "elsewhere"))
    assert again.read_bytes() == wheel.read_bytes()


def test_wheel_works_where_it_is_unpacked(unpacked):
    code = (
        "import sys; sys.modules['triton'] = None; import torch, fused_lora; assert "
        "fused_lora.__file__.startswith(sys.argv[1]);"
        "x = torch.ones(2, 8); print(fused_lora.lora_linear(x, torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2), "
        "0.5, backend='cpu').sum().item())"
    )
    done = run_python(code, str(unpacked), PYTHONPATH=str(unpacked), cwd=unpacked)
    assert done.stdout.strip() == "128.0", done.stderr


def run_python(code, *arguments, cwd=None, **env):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def test_installing_adds_safetensors_to_torch_and_nothing_more(distribution):
    def needed(requirements):
        parsed = [Requirement(line) for line in requirements or []]
        return {r.name: r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}

    core = needed(distribution.requires)
    assert set(core) == {"torch", "safetensors"}
    assert core["torch"].specifier.contains(metadata.version("torch"))  # what is there stays
    assert not needed(metadata.requires("safetensors"))


def test_metadata(distribution):
    assert distribution.version == fused_lora.__version__
    classifiers = distribution.metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers
    extras = {"cli", "peft", "finetune", "bench", "bitsandbytes", "torchao", "test", "dev"}
    assert extras == set(distribution.metadata.get_all("Provides-Extra"))
    (entry,) = distribution.entry_points
    assert entry.name == "fused-lora" and callable(entry.load())
    urls = dict(line.split(", ", 1) for line in distribution.metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} == set(urls)


def test_readme_links_lead_somewhere_here_and_on_the_index(distribution):
    def links(text):
        return re.findall(r"\[[^]]*\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))

    here = links((ROOT / "README.md").read_text())
    missing = [link for link in here if not re.match(r"\w+:|#", link) and not (ROOT / link.split("#")[0]).exists()]
    assert here and not missing
    index = links(distribution.metadata["Description"])
    assert len(index) == len(here) and all(link.startswith(("https://", "#")) for link in index)


def test_cuda_switch_names_what_is_missing(source, tmp_path):
    def refusal(**env):
        done = build("build_wheel", source, tmp_path, **env)
        assert done.returncode == 1 and not list(tmp_path.glob("*.whl"))
        return done.stderr.strip().splitlines()[-1]

    nowhere = str(tmp_path / "nowhere")
    for switch in ("auto", "1"):
        line = refusal(FUSED_LORA_CUDA=switch, CUDA_HOME=nowhere)
        assert line.startswith(f"CUDA_HOME must be a CUDA toolkit; got {nowhere}, which has no bin/nvcc")
    assert refusal(FUSED_LORA_CUDA="yes") == "FUSED_LORA_CUDA must be auto, 0 or 1; got 'yes'"
    compiler(tmp_path / "cuda/bin/nvcc")
    line = refusal(CUDA_HOME=str(tmp_path / "cuda"))
    assert line.startswith(f"{tmp_path / 'cuda/bin/ptxas'} must be an assembler that tells its release; it says ")
    assembler(tmp_path / "cuda/bin/ptxas")
    line = refusal(CUDA_HOME=str(tmp_path / "cuda"))
    assert line.startswith(
        f"the CUDA toolkit at {tmp_path / 'cuda'} must hold libcudart_static.a; looked in lib64, lib,"
    )
    assert f"targets/{platform.machine().replace('aarch64', 'sbsa')}-linux/lib" in line
    line = refusal(CUDA_HOME=str(tmp_path / "cuda"), FUSED_LORA_CUDA_ARCHS="9.0a")
    assert line == "FUSED_LORA_CUDA_ARCHS must look like 90a or 90a;100a; got '9.0a'"


def test_a_limit_that_is_no_number_is_refused_in_one_line(setup_module, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_SPIN_LIMIT", "1e6")
    with pytest.raises(SystemExit, match="^FUSED_LORA_SPIN_LIMIT must be a whole number of turns; got '1e6'$"):
        setup_module.spin_limit()


def test_failed_compilation_is_an_error(source, tmp_path):
    done = build("build_wheel", source, tmp_path, FUSED_LORA_CUDA="0", CXX="false")
    assert done.returncode == 1 and "fused_lora._C did not build (without CUDA)" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.fixture(scope="module")
def setup_module():
    spec = importlib.util.spec_from_file_location("fused_lora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused_in_one_line(setup_module, monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    command = setup_module.NinjaBuild(Distribution())
    with pytest.raises(SystemExit, match="^fused-lora builds on Linux only; this is "):
        command.build_extension(setup_module.Extension("fused_lora._C", []))


def test_cuda_build_in_a_folder_with_odd_characters(sdist, tmp_path):
    """Everything but the compilers is real: setup.py, ninja and the shell between them."""
    folder = tmp_path / ODD
    folder.mkdir()
    cxx, nvcc = compiler(tmp_path / "cxx"), compiler(folder / "cuda/bin/nvcc")
    assembler(folder / "cuda/bin/ptxas")
    libraries = folder / "cuda/targets/{}-linux/lib".format(platform.machine().replace("aarch64", "sbsa"))
    libraries.mkdir(parents=True)
    (libraries / "libcudart_static.a").touch()
    source = unpack(sdist, folder)
    ccache = tmp_path / "ccache"
    ccache.write_text('#!/bin/sh\nexec "$@"\n')
    ccache.chmod(0o755)
    compilers = dict(CXX=f"{ccache} {cxx}", CUDA_HOME=str(folder / "cuda"), FUSED_LORA_CUDA="1")
    done = build("build_wheel", source, tmp_path, **compilers)
    assert done.returncode == 0, done.stderr
    compiled = {c[c.index("-c") + 1]: c for c in calls(nvcc) if "--dryrun" not in c}
    assert set(compiled) == {f"csrc/{name}" for name in files("csrc", ".cu")}
    assert all("-gencode=arch=compute_90a,code=sm_90a" in c for c in compiled.values())
    assert all(c[c.index("-ccbin") + 1] == str(cxx) for c in compiled.values())
    assert not any("-gencode=arch=compute_80,code=sm_80" in c for c in compiled.values())
    compiled = {c[c.index("-c") + 1]: c for c in calls(cxx) if "-c" in c}
    assert set(compiled) == {f"csrc/{name}" for name in files("csrc", ".cpp")}
    for call in compiled.values():
        assert '-DFUSED_LORA_CUDA_ARCHS="90a"' in call and f"-I{folder / 'cuda/include'}" in call
    (link,) = [c for c in calls(cxx) if "-shared" in c]
    objects = [argument for argument in link if argument.endswith(".o")]
    assert f"-L{libraries}" in link and len(objects) == len(files("csrc", ".cpp", ".cu"))


def test_an_assembler_that_miscompiles_is_warned_of(setup_module, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FUSED_LORA_CUDA_ARCHS", raising=False)
    assert setup_module.ptxas_release(assembler(tmp_path / "new", "13.3")) == "13.3"
    assert capsys.readouterr().err == ""
    shown = "13.0, which may miscompile: see docs/install.md"
    assert setup_module.ptxas_release(assembler(tmp_path / "old", "13.0")) == shown
    said = capsys.readouterr()
    assert "assembled by ptxas 13.0" in said.out and "warning: ptxas 13.0 may miscompile" in said.err
    monkeypatch.setenv("FUSED_LORA_CUDA_ARCHS", "100a")
    setup_module.ptxas_release(tmp_path / "old")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(NVCC is None, reason="needs nvcc (the CUDA toolkit)")
def test_another_assembler_in_place_of_the_toolkits(setup_module, tmp_path):
    """nvcc calls the ptxas that it is given, and everything else of its own toolkit."""
    log, own = tmp_path / "log", setup_module.cuda_home() / "bin/ptxas"
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(f'#!/bin/sh\necho called >> "{log}"\nexec "{own}" "$@"\n')
    ptxas.chmod(0o755)
    (tmp_path / "k.cu").write_text("__global__ void k(float* p) { *p = 1; }")
    nvcc = setup_module.nvcc_with_ptxas(setup_module.cuda_home(), ptxas, tmp_path / "other folder")
    subprocess.run([nvcc, "-arch=sm_90a", "-c", tmp_path / "k.cu", "-o", tmp_path / "k.o"], check=True)
    assert (tmp_path / "k.o").exists() and "called" in log.read_text()


@pytest.mark.skipif(NVCC is None, reason="needs nvcc (the CUDA toolkit)")
def test_nvcc_compiles_in_a_folder_with_odd_characters(sdist, tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    source = unpack(sdist, folder)
    code = (
        "from pathlib import Path; import setup; folder = Path('build'); folder.mkdir();"
        "text = setup.build_ninja(folder, folder / '_C.so', setup.pybind11_headers(folder), setup.cuda_home());"
        "Path('build/build.ninja').write_text(text)"
    )
    assert run_python(code, cwd=source, FUSED_LORA_CUDA="1").returncode == 0
    ninja = [sys.executable, "-m", "ninja", "-f", "build/build.ninja", "build/csrc/cuda/prepare.cu.o"]
    done = subprocess.run(ninja, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ninja: no work to do." in subprocess.run(ninja, cwd=source, capture_output=True, text=True).stdout


def test_editable_build_compiles_only_what_changed(sdist, tmp_path):
    source, cxx = unpack(sdist, tmp_path), compiler(tmp_path / "cxx")

    def compiled():
        cxx.with_suffix(".log").unlink(missing_ok=True)
        done = build("build_editable", source, tmp_path, FUSED_LORA_CUDA="0", CXX=str(cxx))
        assert done.returncode == 0, done.stderr
        return sorted(call[call.index("-c") + 1] for call in calls(cxx) if "-c" in call)

    assert "csrc/cpu/shrink.cpp" in compiled() and list(source.glob("src/fused_lora/_C.*.so"))
    assert compiled() == []
    (source / "csrc/cpu/shrink.cpp").write_text("// changed\n")
    assert compiled() == ["csrc/cpu/shrink.cpp"]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_extension_links_to_no_framework():
    done = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout))
    assert needed  # readelf's lines are read as they are written
    loader = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    libraries = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert needed <= libraries | loader | {"libdl.so.2", "librt.so.1", "libpthread.so.0"}


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"compiler", "cuda", "cuda_archs", "ptxas"}
    assert info["cuda"] == bool(info["cuda_archs"]) == bool(info["ptxas"])
