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
