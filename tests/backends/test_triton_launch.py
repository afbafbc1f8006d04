"""launch does what Triton's own launch does: by the checks of check_triton_launch.py, and by a result."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_lora.triton_kernels.launch import launch

SCRIPT = Path(__file__).with_name("check_triton_launch.py")
_spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
_spec.loader.exec_module(checks := importlib.util.module_from_spec(_spec))


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str | None]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", checks.CHECKS)
def test_fake_driver(name, failures):
    assert failures[name] is None, failures[name]


def test_result(on_triton):
    """On a GPU the direct launch, in the interpreter Triton's own, which takes no bool in release 3.6: hence flag =
    1."""
    for factor in (0.5, 2.0, 3.0):
        x, seed = torch.randn(64, device=on_triton.device), torch.tensor(3, device=on_triton.device)
        ours = torch.empty_like(x)
        launch(checks.scale_kernel, (1,), (x, None, x, 5, factor, seed, 1, ours), dict(SIZE=64, NAME="a", num_warps=4))
        torch.testing.assert_close(ours, x * factor + x + 8)
