"""The bf16 kernels for AMX on a CPU without it: its instructions are emulated (amx_emulator/), and the CPU back end's
own tests run over them, in processes that import a copy of the package built so.

All else in those kernels is AVX512-BF16, which the CPU must have.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_lora import _C

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
TILES = TESTS / "native" / "amx_emulator" / "tiles.h"
FILES = (
    "backends/test_cpu.py", "backends/test_cpu_few_rows.py", "backends/test_optional.py", "ops/test_grouped.py",
    "ops/test_grouped_linear.py", "ops/test_experts.py",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not _C.cpu_features()["bf16_dot"], reason="needs a CPU with AVX512-BF16")


def build(repository: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"FUSED_LORA_CUDA": "0"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def run(repository: Path, *command: str) -> subprocess.CompletedProcess:
    """A Python process that imports the copy."""
    environment = os.environ | {"PYTHONPATH": str(repository / "src")}
    environment.pop("FUSED_LORA_MAX_CPU_ISA", None)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of this one, to be built over emulated tiles."""
    copy = tmp_path_factory.mktemp("amx") / "repository"
    built = shutil.ignore_patterns("_C.*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "src", "triton_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copy(TILES, copy / "csrc" / "cpu")
    return copy


@pytest.mark.parametrize("file", FILES)
def test_over_emulated_tiles(repository, file):
    build(repository)
    done = run(repository, "-m", "pytest", str(TESTS / file), "-q", "-rs", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "AMX-BF16" not in done.stdout  # nothing was skipped for the want of it


# What the emulator must see: the edit of a source, and what is said of it.
STATE = "  const Tiles tiles;\n"
CALL = (
    "import torch; from fused_lora.testing import *; p = exact_problem(40, 40, 40, 40, torch.bfloat16); "
    "assert_exact(run(p, backend='cpu:inside'), truth(p))"
)


@pytest.mark.parametrize(
    "source, old, new, said",
    [
        ("amx_gemm.cpp", STATE, "", "an instruction without a tile state"),
        ("amx_gemm.cpp", STATE, STATE + "  const Tiles again;\n", "a tile state is set twice"),
        ("amx_gemm.cpp", "tile_zero<0>(), ", "", "AssertionError"),
        ("amx_low_rank.cpp", "tile_dot<2, 5, 6>()", "tile_dot<2, 4, 6>()", "AssertionError"),
    ],
)
def test_a_fault_is_seen(repository, source, old, new, said):
    path = repository / "csrc" / "cpu" / source
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    try:
        build(repository)
        done = run(repository, "-c", CALL)
    finally:
        path.write_text(text)
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]
