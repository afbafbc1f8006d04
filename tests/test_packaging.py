"""The build as users meet it: sdist, wheel, switches, what the extension links to, and an import without torch's
headers or Triton."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fused_lora import _C

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; sys.modules['torch'] = None; from setuptools import build_meta as b; print(b.{hook}(sys.argv[1]))"


def build(hook, source, out, **env):
    """Runs one PEP 517 hook in `source` with torch out of reach; returns the finished process."""
    command = [sys.executable, "-c", BUILD.format(hook=hook), str(out)]
    return subprocess.run(command, cwd=source, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    clean = out / "source"
    shutil.copytree(
        ROOT,
        clean,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "demo", "__pycache__"),
    )
    done = build("build_sdist", clean, out)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as tar:
        tar.extractall(out, filter="data")
    return next(out.glob("fused_lora-*/"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = build("build_wheel", sdist, out, FUSED_LORA_CUDA="0")
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_sdist_holds_every_source(sdist):
    expected = {
        p.relative_to(ROOT)
        for folder in ("csrc", "triton_kernels", "src")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".h", ".cuh", ".cpp", ".cu", ".py")
    }
    missing = {p for p in expected if not (sdist / p).exists()}
    assert not missing
    assert (sdist / "LICENSE").exists() and (sdist / "README.md").exists() and (sdist / "tests").is_dir()


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("fused_lora/_C.") and n.endswith(".so") for n in names)
    for module in ("__init__", "functional", "backends/cpu", "triton_kernels/__init__"):
        assert f"fused_lora/{module}.py" in names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"fused_lora"}


def test_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.modules['triton'] = None; import torch, fused_lora; assert "
        "fused_lora.__file__.startswith(sys.argv[1]);"
        "x = torch.ones(2, 8); print(fused_lora.lora_linear(x, torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2), "
        "0.5, backend='cpu').sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "128.0", done.stderr


def test_cuda_switch_names_what_is_missing(sdist, tmp_path):
    done = build("build_wheel", sdist, tmp_path, FUSED_LORA_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode != 0 and "FUSED_LORA_CUDA=1 needs nvcc" in done.stderr
    done = build("build_wheel", sdist, tmp_path, FUSED_LORA_CUDA="yes")
    assert done.returncode != 0 and "FUSED_LORA_CUDA must be auto, 0 or 1; got 'yes'" in done.stderr


def test_failed_compilation_is_an_error(sdist, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(sdist, broken)
    (broken / "csrc" / "cpu" / "shrink.cpp").write_text("this is not C++\n")
    done = build("build_wheel", broken, tmp_path, FUSED_LORA_CUDA="0")
    assert done.returncode != 0 and "fused_lora._C did not build" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_extension_links_to_no_framework():
    lines = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    needed = {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}
    assert needed <= {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libdl.so.2",
        "librt.so.1",
        "libpthread.so.0",
        "ld-linux-x86-64.so.2",
    }


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"compiler", "cuda", "cuda_archs"}
    if shutil.which("nvcc") and os.environ.get("FUSED_LORA_CUDA", "auto") != "0":
        assert info["cuda"] and "90a" in info["cuda_archs"] and "80" in info["cuda_archs"]


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120
