"""bench/gpu_check.sh against a stand-in for Python: its table, its exit, and that nothing outlives a part."""

import os
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"


def check(tmp_path, parts: str, python: str) -> str:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/bash\n{python}\n")
    stub.chmod(0o755)
    given = os.environ | dict(OUT=str(tmp_path / "out"), PARTS=parts, PYTHON=str(stub))
    return subprocess.run(["bash", SCRIPT], env=given, capture_output=True, text=True, timeout=60).stdout


def test_a_failing_part_is_in_the_table_and_the_rest_goes_on(tmp_path):
    said = check(tmp_path, "build bench", 'echo "ran $*"; [[ "$*" != *pip* ]]')
    table = said.strip().splitlines()[-2:]
    assert re.fullmatch(r"build +rc 1 +\d+ s +ran -m pip install .*", table[0])
    assert re.fullmatch(r"bench +ok +\d+ s +ran -m fused_lora bench --device cuda .*", table[1])
    assert "ran -m fused_lora bench" in (tmp_path / "out" / "bench.log").read_text()


def test_nothing_outlives_a_part(tmp_path):
    """Neither what a part has put in the background nor what ignores the signal to end."""
    part = re.search(r"(?ms)^part\(\) \{.*?^\}", SCRIPT.read_text())[0]
    left = tmp_path / "left"
    # in a process group of its own, as `timeout` makes one, which the signal to the part does not reach
    command = f"trap '' TERM; timeout 100 bash -c 'while sleep 0.1; do date >> {left}; done' & sleep 100"
    call = 'part long 1 bash -c "$0"; echo "${TABLE[0]}"'
    run = f"set -o pipefail; OUT={tmp_path}; declare -a TABLE\n{part.replace('-k 10', '-k 1')}\n{call}"
    start = time.monotonic()
    said = subprocess.run(["bash", "-c", run, command], capture_output=True, text=True, timeout=60)
    assert "long       rc" in said.stdout, said
    assert time.monotonic() - start < 30
    size = left.stat().st_size
    time.sleep(0.5)
    assert size and left.stat().st_size == size, "the background loop still writes"


def test_an_unknown_part_is_refused(tmp_path):
    stub = os.environ | dict(OUT=str(tmp_path), PARTS="builds")
    done = subprocess.run(["bash", SCRIPT], env=stub, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "PARTS must be among build bringup tests" in done.stderr
