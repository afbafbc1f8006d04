"""Every file of examples/ runs as its head says, on SmolLM2-135M where it takes a model."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_its_head_says(path):
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("Run: ")]
    program, *arguments = shlex.split(line.removeprefix("Run: ").replace("[MODEL]", ""))
    assert arguments[-1] == f"examples/{path.name}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*PROGRAMS[program], *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(line.rpartition("loss ")[2]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert losses == sorted(losses, reverse=True)  # what trains gets better
    assert ("loss.backward()" in path.read_text()) == (len(losses) > 1)
