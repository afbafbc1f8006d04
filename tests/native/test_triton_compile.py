"""The Triton kernels compile for GPUs that this machine does not have, with the tiles that the choices give there.

In a process of its own: the tests' process may have chosen Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {
    "sm_80": dict(backend="cuda", arch=80, warp=32, tma=False, sms=108, shared=166912),
    "sm_89": dict(backend="cuda", arch=89, warp=32, tma=False, sms=128, shared=101376),
    "sm_90": dict(backend="cuda", arch=90, warp=32, tma=True, sms=132, shared=232448),
    "sm_100": dict(backend="cuda", arch=100, warp=32, tma=True, sms=148, shared=232448),
    "gfx942": dict(backend="hip", arch="gfx942", warp=64, tma=False, sms=304, shared=65536),
}

_SCRIPT = Path(__file__).with_name("compile_triton.py")


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile(name, tmp_path):
    """Shared and tensor memory fit for every rank; with TMA both GEMMs run on the wide mma; on Hopper registers do not
    spill."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(_SCRIPT), json.dumps(TARGETS[name])]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    print(*rows, sep="\n")
    one_launch = {"lora_gemm_shrink_kernel"} if TARGETS[name]["tma"] else set()
    every = {"shrink_kernel", "wgrad_kernel", "dy_pass_kernel", "lora_gemm_kernel", "sum_slabs_kernel"} | one_launch
    if name in ("sm_90", "gfx942"):
        every |= {"low_gradient_kernel", "expand_kernel", "sums_kernel", "columns_kernel", "select_kernel"}
        every |= {"grouped_shrink_kernel", "grouped_expand_kernel", "grouped_wgrad_kernel", "sum_groups_kernel"}
    assert {row["kernel"] for row in rows} == every
    if TARGETS[name]["tma"]:
        gemms = [row for row in rows if row["kernel"] in ("lora_gemm_kernel", "lora_gemm_shrink_kernel")]
        assert all(row["mma"] > 4 and row["bulk"] >= 7 for row in gemms), (
            "the base product runs on wgmma or tcgen05, fed by TMA"
        )
    if name == "sm_90":
        large = ("dropout=True", "R=256")  # whose epilogues may spill a few bytes a thread
        assert not [row for row in rows if row["stack"] > (128 if any(word in row["what"] for word in large) else 0)], (
            "registers spill"
        )
        masked = ("shrink_kernel", "low_gradient_kernel", "grouped_shrink_kernel")
        assert all(row["mma"] == 0 for row in rows if row["kernel"] in masked), (
            "the masked left operand stays off wgmma"
        )
