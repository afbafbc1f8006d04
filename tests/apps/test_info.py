"""`fused-lora info`: what is installed, what is missing, which back end serves what; in 80 columns."""

import importlib
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from fused_lora.cli import app

info = importlib.import_module("fused_lora.cli.info")  # the package has the command under this name

WITHOUT = """
import sys
for name in ('transformers', 'peft', 'triton', 'matplotlib', 'gguf'):
    sys.modules[name] = None
from fused_lora.cli import app
app(['info'], prog_name='fused-lora')
"""


def said(monkeypatch, columns=80):
    monkeypatch.setattr(info.out, "width", columns)
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0, done.exception
    return done.stdout


def served(text):
    """Back end by device and dtype."""
    table = text.split("backend='auto' for plain LoRA\n")[1].splitlines()[1:]
    rows = [re.split(r"  +", line) for line in table if not line.startswith(" ")]
    return {(device, dtype): back_end for device, dtypes, back_end, _ in rows for dtype in dtypes.split(", ")}


def test_info_says_what_serves_each_dtype(monkeypatch):
    text = said(monkeypatch)
    assert "CPU kernels and " in text and "does not load" not in text and torch.__version__ in text
    answers = served(text)
    assert answers["cpu", "float32"] == answers["cpu", "bfloat16"] == answers["cpu", "float16"] == "cpu"
    assert answers["cpu", "float64"] == "reference"


@pytest.mark.parametrize("columns", [80, 120])
def test_info_fits_the_terminal(monkeypatch, columns):
    lines = said(monkeypatch, columns).splitlines()
    assert all(len(line) <= columns and line == line.rstrip() for line in lines), lines


def test_info_works_without_the_extras():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0 and served(done.stdout)["cpu", "float32"] == "cpu", done.stderr


def test_info_names_what_extras_lack(monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("gguf", "matplotlib"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    wants = ["torch>=2", 'Gguf-x>=1; extra == "bench"', 'gguf>=0.10; extra == "bench"', 'gguf>=1; extra == "test"']
    wants += ["fused-lora[bench]; extra == 'finetune'", "matplotlib; extra == 'finetune'", "torch; extra == 'peft'"]
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: wants)
    assert info.missing_of_extras() == {"finetune": ["matplotlib"], "bench": ["Gguf-x", "gguf"]}
    assert "fused-lora[bench]     Gguf-x, gguf" in said(monkeypatch)


def test_info_says_nothing_of_extras_that_are_whole(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ['torch; extra == "bench"'])
    assert "extras" not in said(monkeypatch)


def test_a_dtype_that_is_none_is_refused(refused):
    assert "dtype must be one of fp32, bf16, fp16; got 'nonsense'" in refused(2, "info", "--dtype", "nonsense")
