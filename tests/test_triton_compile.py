"""The Triton kernels compile for GPUs that this machine does not have, with the tiles that the choices give there.

In a process of its own: the tests' process may have chosen Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

TARGETS = {
    "sm_80": dict(backend="cuda", arch=80, warp=32, tma=False, sms=108, shared=166912),
    "sm_89": dict(backend="cuda", arch=89, warp=32, tma=False, sms=128, shared=101376),
    "sm_90": dict(backend="cuda", arch=90, warp=32, tma=True, sms=132, shared=232448),
    "sm_100": dict(backend="cuda", arch=100, warp=32, tma=True, sms=148, shared=232448),
    "gfx942": dict(backend="hip", arch="gfx942", warp=64, tma=False, sms=304, shared=65536),
}

_COMPILE = r"""
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.lora_gemm import lora_gemm_kernel
from fused_lora.triton_kernels.shrink import shrink_kernel
from fused_lora.triton_kernels.wgrad import sum_splits_kernel, wgrad_kernel

t = json.loads(sys.argv[1])
device = configs.Device(t["tma"], t["sms"], t["shared"])
INTS = {"M", "N", "K", "C", "R", "size", "splits", "rows_per_split", "threshold"}
FLOATS = {"factor", "keep_factor"}
ONES = {"stride_tk"}  # what Triton specialises on 1

def compile(kernel, types, constexprs, num_stages, num_warps):
    '''Compile for the target as a launch with sizes divisible by 16 would; returns what it needs of the device.'''
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
            if types[name].startswith("*"):
                attrs[(i,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name != "threshold" and name != "splits":
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    out = triton.compile(source, target=GPUTarget(t["backend"], t["arch"], t["warp"]), options=dict(num_stages=num_stages, num_warps=num_warps))
    binary = out.asm["cubin"] if t["backend"] == "cuda" else out.asm["hsaco"]
    assert len(binary) > 0
    assert out.metadata.shared <= t["shared"], f"{kernel.__name__}: shared memory {out.metadata.shared} over {t['shared']}"
    return [kernel.__name__, out.metadata.shared, out.asm.get("ptx", "").count("wgmma.mma_async")]

rows = []
for R, dropout, thin in ((16, False, "bf16"), (64, True, "fp32"), (256, False, "bf16")):
    M, N, K = 8192, 4096, 4096
    seed = {"seed_ptr": "*i64"} if dropout else {}
    none = {} if dropout else {"seed_ptr": None}
    c = configs.shrink_config(M, K, R, 2, device)
    common = dict(R=R, PRECISION="ieee")
    rows.append(compile(shrink_kernel, dict(x="*bf16", thin="*" + thin, h="*bf16", **seed),
        dict(common, **none, DROPOUT=dropout, stride_tk=1, BLOCK_M=c.BLOCK_M, BLOCK_R=c.BLOCK_R, BLOCK_K=c.BLOCK_WIDE), c.num_stages, c.num_warps))
    c = configs.wgrad_config(M, K, R, 2, device)
    rows.append(compile(wgrad_kernel, dict(thin="*bf16", wide="*bf16", out="*fp32", **seed),
        dict(common, **none, DROPOUT=dropout, stride_oc=1, BLOCK_M=c.BLOCK_M, BLOCK_R=c.BLOCK_R, BLOCK_C=c.BLOCK_WIDE), c.num_stages, c.num_warps))
    for right_nk in (True, False):
        drop = dropout and not right_nk
        c = configs.gemm_config(M, N, K, R, 2, drop, device)
        right = [c.BLOCK_N, c.BLOCK_K] if right_nk else [c.BLOCK_K, c.BLOCK_N]
        tile = lambda a, b: f"tensordesc<bf16[{a}, {b}]>" if t["tma"] else "*bf16"
        types = dict(left=tile(c.BLOCK_M, c.BLOCK_K), right=tile(*right), out=tile(c.BLOCK_M, c.BLOCK_N), low="*bf16", thin="*" + thin)
        constants = dict(common, RIGHT_NK=right_nk, BIAS=right_nk, DROPOUT=drop, TMA=t["tma"], BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N,
            BLOCK_K=c.BLOCK_K, BLOCK_R=c.BLOCK_R, GROUP_M=c.GROUP_M)
        constants |= {"stride_tr": 1} if right_nk else {"stride_tn": 1, "bias": None}
        types |= {"bias": "*bf16"} if right_nk else {}
        types, constants = (types | {"seed_ptr": "*i64"}, constants) if drop else (types, constants | {"seed_ptr": None})
        rows.append(compile(lora_gemm_kernel, types, constants, c.num_stages, c.num_warps))
rows.append(compile(sum_splits_kernel, dict(partial="*fp32", out="*bf16"), dict(BLOCK=1024), 3, 4))
print(json.dumps(rows))
"""


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile(name, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _COMPILE, json.dumps(TARGETS[name])], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    print(*rows, sep="\n")
    assert {row[0] for row in rows} == {"shrink_kernel", "wgrad_kernel", "lora_gemm_kernel", "sum_splits_kernel"}
    if name == "sm_90":
        assert all(row[2] > 0 for row in rows if row[0] == "lora_gemm_kernel"), "the base product runs on wgmma"
        assert all(row[2] == 0 for row in rows if row[0] == "shrink_kernel"), "the masked left operand stays off wgmma"
