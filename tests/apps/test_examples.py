"""Every file of examples/ runs as its head says, on SmolLM2-135M where it takes a model: on the packaged file, or on
the directory of the same weights that is given in place of it, which loads at once."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_lora.models import load_model, packaged_model

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
ON_THE_PACKAGED_FILE = "qlora"  # which saves again what it has loaded


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The packaged model as a directory: reading its GGUF file takes longer than an example."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in load_model(packaged_model(), torch.float32, "cpu"):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_its_head_says(path, directory):
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("Run: ")]
    model = "" if path.stem == ON_THE_PACKAGED_FILE else directory
    program, *arguments = shlex.split(line.removeprefix("Run: ").replace("[MODEL]", model))
    assert f"examples/{path.name}" in arguments[-2:]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*PROGRAMS[program], *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(line.rpartition("loss ")[2]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert losses == sorted(losses, reverse=True)  # what trains gets better
    assert ("loss.backward()" in path.read_text()) == (len(losses) > 1)
