"""The plan of the house: imports run down, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py"), ROOT / "setup.py"])


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    statements = function.body
    first = statements[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        statements = statements[1:]
    return 0 if not statements else statements[-1].end_lineno - statements[0].lineno + 1


def test_imports_run_down():
    command = [Path(sys.executable).with_name("lint-imports")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    text = path.read_text()
    limit = 400 if path.parent.name == "triton_kernels" else 300
    assert len(text.splitlines()) <= limit
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    kernels = {f.name for f in functions if any("jit" in ast.dump(d) for d in f.decorator_list)}
    assert [f.name for f in functions if body_lines(f) > 50 and f.name not in kernels] == []


@pytest.mark.parametrize("suffix", [".h", ".cpp", ".cu", ".cuh"])
def test_native_files_are_small(suffix):
    """At most 400 lines of at most 120 columns; clang-format leaves comments alone."""
    files = {path: path.read_text().splitlines() for path in (ROOT / "csrc").rglob(f"*{suffix}")}
    assert [path for path, lines in files.items() if len(lines) > 400] == []
    assert [f"{path}:{i}" for path, lines in files.items() for i, line in enumerate(lines, 1) if len(line) > 120] == []
