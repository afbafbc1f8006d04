"""What `import fused_lora` and its program need: torch and safetensors, and no extra."""

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fused_lora

WITHOUT_PART = "fused-lora's compiled part does not load ("


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


@pytest.fixture
def damaged(tmp_path):
    """The environment of a process in which the package has a damaged compiled part."""
    package = tmp_path / "fused_lora"
    package.mkdir()
    for path in Path(fused_lora.__file__).parent.iterdir():
        if not path.name.startswith("_C."):
            (package / path.name).symlink_to(path)
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"half")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.fixture(params=["damaged", "nonsense"])
def without_part(request, damaged):
    """The same, or one where the environment asks for what the compiled part refuses."""
    return damaged if request.param == "damaged" else os.environ | {"FUSED_LORA_MAX_CPU_ISA": "nonsense"}


def test_a_compiled_part_that_does_not_load_is_one_line(without_part):
    """A red line of every command that needs it; the others work, and `info` says why."""

    def called(*arguments):
        command = [sys.executable, "-m", "fused_lora", *arguments]
        return subprocess.run(command, env=without_part, capture_output=True, text=True)

    commands = [["bench"], ["tune", "--show"], ["merge", "x"], ["analyze", "."], ["finetune"]]
    for arguments in commands[:1] if "FUSED_LORA_MAX_CPU_ISA" in without_part else commands:
        done = called(*arguments)
        assert done.returncode == 1 and done.stdout == "", done.stdout
        assert done.stderr.startswith(f"error: {WITHOUT_PART}") and done.stderr.count("\n") == 1, done.stderr
    assert (done := called("--help")).returncode == 0 and "finetune" in done.stdout, done.stderr
    done = called("info")
    assert done.returncode == 0 and done.stderr == "" and "back end" not in done.stdout, done.stderr
    said = " ".join(done.stdout.split())
    assert "compiled part does not load (" in said and f"torch {torch.__version__}" in said
    assert ("C++ compiler" in said) == ("FUSED_LORA_MAX_CPU_ISA" not in said)


def test_without_the_compiled_part_every_name_says_so(without_part):
    for use in (
        "fused_lora.apply_lora",
        "fused_lora.tune",
        "from fused_lora import lora_linear",
        "import fused_lora.nn",
    ):
        code = f"import fused_lora\ntry:\n    {use}\nexcept ImportError as error:\n    print(error)"
        done = subprocess.run([sys.executable, "-c", code], env=without_part, capture_output=True, text=True)
        assert done.stdout.startswith(WITHOUT_PART), done.stderr


def test_the_core_works_without_the_extras(tmp_path):
    """Apply, train, save and load, beside torch and safetensors alone."""
    code = """
import sys
for name in ("accelerate", "gguf", "matplotlib", "peft", "rich", "transformers", "triton", "typer"):
    sys.modules[name] = None
import fused_lora, torch
def model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"up": torch.nn.Linear(16, 32)})
trained = model()
fused_lora.apply_lora(trained, r=4, lora_alpha=8, target_modules=["up"])
x = torch.randn(5, 16)
trained["up"](x).sum().backward()
with torch.no_grad():
    for p in trained.parameters():
        if p.grad is not None:
            p -= p.grad
fused_lora.save_adapter(trained, sys.argv[1])
fused_lora.load_adapter(loaded := model(), sys.argv[1])
assert not torch.equal(trained["up"](x), model()["up"](x))
assert torch.equal(trained["up"](x), loaded["up"](x))
print("done")
"""
    assert (done := run_python(code, str(tmp_path))).stdout == "done\n", done.stderr


def test_tune_needs_no_extra():
    code = """
import sys
for name in ("accelerate", "gguf", "matplotlib", "peft", "rich", "transformers", "typer"):
    sys.modules[name] = None
import fused_lora, torch
from fused_lora.tuning import job
model = torch.nn.Sequential(torch.nn.Linear(16, 32))
print(job.cases_for(model, "cpu")[0].name, job.candidates_for(job.cases_for(model, "cpu")[0], torch.device("cpu"))[-1])
import fused_lora.tuning.worker
"""
    done = run_python(code)
    assert done.stdout == "float32  M=64       16->32    R=16  p=0 reference\n", done.stderr
