"""What `import fused_lora` and its program need: torch and safetensors, and no extra."""

import subprocess
import sys

import pytest


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_import_loads_no_extra():
    """`import fused_lora` costs torch and safetensors, and works without the extras."""
    extras = ("accelerate", "gguf", "matplotlib", "peft", "rich", "transformers", "triton", "typer")
    code = f"import fused_lora, sys; print([m for m in {extras} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_command_line_without_its_libraries_says_what_to_install(name):
    code = f"import sys; sys.modules[{name!r}] = None; from fused_lora.__main__ import main; main()"
    done = run_python(code)
    assert done.returncode == 1
    assert done.stderr == f"fused-lora: {name} is not installed: pip install 'fused-lora[cli]'\n"
