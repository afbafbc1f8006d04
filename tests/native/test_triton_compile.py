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
import json, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.dy_pass import dy_pass_kernel
from fused_lora.triton_kernels.lora_gemm import lora_gemm_kernel
from fused_lora.triton_kernels.lora_gemm_shrink import lora_gemm_shrink_kernel
from fused_lora.triton_kernels.shrink import shrink_kernel
from fused_lora.triton_kernels.wgrad import sum_slabs_kernel, wgrad_kernel

t = json.loads(sys.argv[1])
device = configs.Device(t["tma"], t["sms"], t["shared"])
FLOATS = {"factor", "keep_factor", "more_factor"}
UNALIGNED = {"threshold", "count", "more_count"}
M, N, K = 8192, 4096, 4096
rows = []
configs.ONE_LAUNCH = True  # chosen nowhere until it has run on a GPU, and compiled all the same

def stack_bytes(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(told.split("STACK:")[1].split()[0])

def compile(what, kernel, c, types, **constexprs):
    '''Compile for the target as a launch with sizes divisible by 16 would; notes what it needs of the device.'''
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "fp32" if name in FLOATS else "i32")
        if name not in FLOATS | UNALIGNED and not signature[name].startswith("tensordesc"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    target = GPUTarget(t["backend"], t["arch"], t["warp"])
    out = triton.compile(source, target=target, options=dict(num_stages=c.num_stages, num_warps=c.num_warps))
    binary = out.asm["cubin"] if t["backend"] == "cuda" else out.asm["hsaco"]
    assert len(binary) > 0
    shared = out.metadata.shared
    assert shared <= t["shared"], f"{kernel.__name__} {what}: shared memory {shared} over {t['shared']}"
    tensor_memory = getattr(out.metadata, "tmem_size", 0) or 0
    # more columns of tensor memory than there are: the compiled code is empty
    assert tensor_memory <= 512, f"{kernel.__name__} {what}: {tensor_memory} columns of tensor memory over 512"
    ptx = out.asm.get("ptx", "")
    stack = stack_bytes(binary) if t["backend"] == "cuda" and t["arch"] <= 90 else 0
    products = ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma")
    rows.append([kernel.__name__, what, shared, products, ptx.count("cp.async.bulk.tensor"), stack])

def gemm(what, one_launch, R, right_nk, thin, dropout, tma, c):
    block = lambda a, b: f"tensordesc<bf16[{a}, {b}]>" if tma else "*bf16"
    wide, rank = (c.BLOCK_N, c.BLOCK_K), (c.BLOCK_R, c.BLOCK_K)
    if not right_nk:
        wide, rank = wide[::-1], rank[::-1]
    types = dict(left=block(c.BLOCK_M, c.BLOCK_K), right=block(*wide), out=block(c.BLOCK_M, c.BLOCK_N))
    types |= dict(rank=block(*rank), thin="*" + thin, low="*bf16", bias="*bf16", seed_ptr="*i64", state="*i32")
    constants = dict(R=R, RIGHT_NK=right_nk, BIAS=right_nk, TMA=tma, PRECISION="ieee", PREFETCH=c.PREFETCH)
    constants |= dict(BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=c.BLOCK_R, GROUP_M=c.GROUP_M)
    constants |= {"stride_tr": 1} if right_nk else {"stride_tn": 1, "bias": None}
    if not one_launch:
        constants |= dict(DROPOUT=dropout) | ({} if dropout else {"seed_ptr": None})
    compile(what, lora_gemm_shrink_kernel if one_launch else lora_gemm_kernel, c, types, **constants)

cases = ((16, False, "bf16"), (32, False, "fp32"), (64, True, "fp32"), (256, True, "bf16"), (256, False, "fp32"))
for R, dropout, thin in cases:
    what, common = f"R={R} {thin} dropout={dropout}", dict(R=R, PRECISION="ieee")
    masked = dict(common, DROPOUT=dropout) | ({} if dropout else {"seed_ptr": None})
    c = configs.shrink_config(M, K, R, 2, device)
    compile(what, shrink_kernel, c, dict(x="*bf16", thin="*" + thin, h="*bf16", seed_ptr="*i64"),
        **masked, stride_tk=1, BLOCK_M=c.BLOCK_M, BLOCK_R=c.BLOCK_R, BLOCK_K=c.BLOCK_WIDE)
    c = configs.wgrad_config(M, K, R, 2, device)
    compile(what, wgrad_kernel, c, dict(thin="*bf16", wide="*bf16", out="*fp32", seed_ptr="*i64"),
        **masked, stride_oc=1, BLOCK_M=c.BLOCK_M, BLOCK_R=c.BLOCK_R, BLOCK_C=c.BLOCK_WIDE)
    c = configs.dy_pass_config(M, N, R, 2, device) or configs.dy_pass_config(64, 256, R, 2, device)  # None from R = 64
    if c is not None:
        compile(what, dy_pass_kernel, c, dict(dy="*bf16", thin="*" + thin, h="*bf16", dh="*fp32", dB="*fp32"),
            **common, stride_tr=1, BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_WIDE, BLOCK_R=c.BLOCK_R)
    for right_nk in (True, False):
        drop = dropout and not right_nk
        # with prefetch where it may be; several rank blocks have none
        for configs.PREFETCH in (False, True) if R == 16 else (True,):
            gemm(what, False, R, right_nk, thin, drop, t["tma"], configs.gemm_config(M, N, K, R, 2, drop, device))
        c = configs.gemm_shrink_config(M, N, K, R, 2, device)
        if c is not None and not dropout:
            gemm(what, True, R, right_nk, thin, False, True, c)
for more in (True, False):
    types = dict(slabs="*fp32", out="*bf16", more_slabs="*fp32", more_out="*fp32")
    none = {} if more else dict(more_slabs=None, more_out=None)
    compile(f"more={more}", sum_slabs_kernel, configs.ThinConfig(0, 0, 0, 3, 4), types, BLOCK=512, TOGETHER=8, **none)
print(json.dumps(rows))
"""


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile(name, tmp_path):
    """Shared and tensor memory fit for every rank; with TMA both GEMMs run on the wide mma; on Hopper registers do not
    spill."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps(TARGETS[name])], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        dict(zip(("kernel", "what", "shared", "mma", "bulk", "stack"), row))
        for row in json.loads(done.stdout.splitlines()[-1])
    ]
    print(*rows, sep="\n")
    one_launch = {"lora_gemm_shrink_kernel"} if TARGETS[name]["tma"] else set()
    every = {"shrink_kernel", "wgrad_kernel", "dy_pass_kernel", "lora_gemm_kernel", "sum_slabs_kernel"} | one_launch
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
        assert all(row["mma"] == 0 for row in rows if row["kernel"] == "shrink_kernel"), (
            "the masked left operand stays off wgmma"
        )
