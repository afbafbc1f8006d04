"""bench/gpu_check.sh against a stand-in for Python: its table, its exit, and that nothing outlives a part."""

import os
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"


def check(tmp_path, parts: str, python: str, **environment: str) -> str:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/bash\n{python}\n")
    stub.chmod(0o755)
    given = os.environ | dict(OUT=str(tmp_path / "out"), PARTS=parts, PYTHON=str(stub)) | environment
    return subprocess.run(["bash", SCRIPT], env=given, capture_output=True, text=True, timeout=60).stdout


def test_a_failing_part_is_in_the_table_and_the_rest_goes_on(tmp_path):
    said = check(tmp_path, "build bench", 'echo "ran $*"; [[ "$*" != *pip* ]]')
    table = said.strip().splitlines()[-2:]
    assert re.fullmatch(r"build +rc 1 +\d+ s +ran -m pip install .*", table[0])
    assert re.fullmatch(r"bench +ok +\d+ s +ran -m fused_lora bench --device cuda .*", table[1])
    assert "ran -m fused_lora bench" in (tmp_path / "out" / "bench.log").read_text()


PYTEST = """
[[ "$*" == *--collect-only* ]] && echo "tests/test_gpu.py::test_one[cuda]" && exit
[[ "$*" == "-c import pytest_timeout" ]] && exit
echo "$* ptxas=[$FUSED_LORA_PTXAS] triton=[$TRITON_PTXAS_PATH] path=[$PYTHONPATH]" >> "$OUT/ran"
"""


def test_another_assembler_serves_triton_and_the_toolkits_own_has_its_turn(tmp_path):
    """Where both are there, the tests run with either: in a build of its own, with Triton's, too."""
    table = check(tmp_path, "bench toolkit", PYTEST, FUSED_LORA_PTXAS="/new/ptxas", TRITON_PTXAS_PATH="")
    ran = (tmp_path / "out" / "ran").read_text().splitlines()
    assert ran[0].startswith("-m fused_lora bench") and "ptxas=[/new/ptxas] triton=[/new/ptxas]" in ran[0]
    own = tmp_path / "out" / "toolkit"
    assert f"--target {own} . ptxas=[] triton=[]" in ran[1]
    assert len(ran) == 7 and all(f"ptxas=[] triton=[] path=[{own}]" in line for line in ran[2:6]), ran
    tests = "\n".join(sorted(ran[2:6]))
    assert all(
        word in tests
        for word in ("--timeout=60", "test_gpu.py::test_one -k cuda and not triton", "-k exact and triton")
    )
    assert re.search(r"toolkit +ok +\d+ s +all passed", table)


def test_no_test_is_a_failure(tmp_path):
    table = check(tmp_path, "tests", "true")
    assert re.search(r"tests +rc 1 +\d+ s +no test was found", table)


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
