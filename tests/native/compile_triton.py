"""Compile every Triton kernel for one target, with the tiles that the choices give there.

    python compile_triton.py '{"backend": "cuda", "arch": 90, "warp": 32, "tma": true, "sms": 132, "shared": 232448}'

Prints a JSON list of what each kernel's machine code needs and holds. test_triton_compile.py runs it in a process of
its own, since that of the tests may have chosen Triton's interpreter.
"""

import json
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_lora.triton_kernels import scale_gradient
from fused_lora.triton_kernels.configs import (
    Device,
    backward_plan,
    dy_pass_config,
    expand_config,
    forward_plan,
    grouped_expand_config,
    grouped_shrink_config,
    grouped_wgrad_config,
)
from fused_lora.triton_kernels.dy_pass import dy_pass_kernel
from fused_lora.triton_kernels.expand import expand_kernel
from fused_lora.triton_kernels.grouped_expand import grouped_expand_kernel
from fused_lora.triton_kernels.grouped_shrink import grouped_shrink_kernel
from fused_lora.triton_kernels.grouped_wgrad import SUM_TILE as SUM_GROUPS_TILE
from fused_lora.triton_kernels.grouped_wgrad import grouped_wgrad_kernel, sum_groups_kernel
from fused_lora.triton_kernels.lora_gemm import lora_gemm_kernel
from fused_lora.triton_kernels.lora_gemm_shrink import lora_gemm_shrink_kernel
from fused_lora.triton_kernels.low_gradient import low_gradient_kernel
from fused_lora.triton_kernels.shrink import shrink_kernel
from fused_lora.triton_kernels.wgrad import SUM_TILE, sum_slabs_kernel, wgrad_kernel

FLOATS = {"factor", "keep_factor", "more_factor", "in_factor", "smallest"}
UNALIGNED = {"threshold", "count", "more_count", "G"}  # ints that need not be multiples of 16
M, N, K = 8192, 4096, 4096
# The optional arguments of plain LoRA's kernels.
UNGATED = dict(h_in=None, gate=None, gated=None, in_factor=None, GATES=1)
CASES = ((16, False, "bf16"), (32, False, "fp32"), (64, True, "fp32"), (256, True, "bf16"), (256, False, "fp32"))


def stack_bytes(cubin: bytes) -> int:
    """Bytes a thread spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(told.split("STACK:")[1].split()[0])


def source(kernel, types: dict, constexprs: dict) -> ASTSource:
    """The kernel as a launch with aligned pointers and sizes divisible by 16 would specialise it."""
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "fp32" if name in FLOATS else "i32")
        if name not in FLOATS | UNALIGNED and not signature[name].startswith("tensordesc"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)


class Compiler:
    """For one target; rows grow by one at each kernel."""

    def __init__(self, target: dict):
        self.tma, self.shared = target["tma"], target["shared"]
        self.device = Device(target["tma"], target["sms"], target["shared"])
        self.target, self.rows = GPUTarget(target["backend"], target["arch"], target["warp"]), []

    def compile(self, what: str, kernel, types: dict, **constexprs) -> None:
        options = {name: constexprs.pop(name) for name in ("num_stages", "num_warps") if name in constexprs}
        out = triton.compile(source(kernel, types, constexprs), target=self.target, options=options)
        nvidia = self.target.backend == "cuda"
        binary, ptx = out.asm["cubin" if nvidia else "hsaco"], out.asm.get("ptx", "")
        assert len(binary) > 0
        tensor_memory = getattr(out.metadata, "tmem_size", 0) or 0
        # With more columns of tensor memory than there are, the compiled code is empty.
        for name, needed, most in (("shared", out.metadata.shared, self.shared), ("tensor", tensor_memory, 512)):
            assert needed <= most, f"{kernel.__name__} {what}: {name} memory {needed} over {most}"
        row = dict(kernel=kernel.__name__, what=what, shared=out.metadata.shared)
        row |= dict(mma=ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"), bulk=ptx.count("cp.async.bulk.tensor"))
        row |= dict(stack=stack_bytes(binary) if nvidia and self.target.arch == 90 else 0)  # where the test looks at it
        self.rows.append(row)

    def gemm(self, what: str, kernel, c, R: int, right_nk: bool, thin: str, **constexprs) -> None:
        """lora_gemm, or lora_gemm_shrink, as the forward (right_nk) or the backward launches it."""
        block = lambda *shape: f"tensordesc<bf16[{shape[0]}, {shape[1]}]>" if self.tma else "*bf16"
        of_right, of_down = (c.BLOCK_N, c.BLOCK_K), (c.BLOCK_R, c.BLOCK_K)
        if not right_nk:
            of_right, of_down = of_right[::-1], of_down[::-1]
        types = dict(left=block(c.BLOCK_M, c.BLOCK_K), right=block(*of_right), out=block(c.BLOCK_M, c.BLOCK_N))
        types |= dict(down=block(*of_down), thin="*" + thin, low="*bf16", bias="*bf16", seed_ptr="*i64", state="*i32")
        types |= dict(out_scale="*fp32")
        constexprs |= {"stride_tr": 1} if right_nk else {"stride_tn": 1, "bias": None}
        choices = dict(R=R, RIGHT_NK=right_nk, BIAS=right_nk, PRECISION="ieee")
        self.compile(what, kernel, types, **choices, **c.constexprs, **constexprs)

    def thin_kernels(self, what: str, R: int, thin: str, masked: dict) -> None:
        """shrink, wgrad and dy_pass."""
        forward = forward_plan(M, N, K, R, 2, masked["DROPOUT"], self.device)
        backward = backward_plan(M, N, K, R, 2, masked["DROPOUT"], True, True, True, self.device)
        types, common = dict(thin="*" + thin, down="*" + thin, lora_B="*" + thin, seed_ptr="*i64"), dict(R=R)
        types |= dict(left="*bf16", low="*bf16", out="*fp32", dy="*bf16", h="*bf16", dh="*fp32", dB="*fp32")
        common |= dict(PRECISION="ieee")
        self.compile(
            what, shrink_kernel, types, **common, **masked, **UNGATED, stride_dk=1, **forward.shrink.constexprs
        )
        none = dict(column_scale=None, stride_oc=1)
        self.compile(what, wgrad_kernel, types, **common, **masked, **none, **backward.wgrad_A.constexprs)
        c = backward.dy_pass or dy_pass_config(64, 256, R, 2, self.device)  # from R = 64 on there is none
        if c is not None:
            self.compile(what, dy_pass_kernel, types, **common, stride_br=1, **c.constexprs)

    def gemms(self, what: str, R: int, thin: str, dropout: bool) -> None:
        """Both directions, with prefetch where it may be and in one launch where that may be."""
        for right_nk in (True, False):
            drop = dropout and not right_nk
            masked = dict(DROPOUT=drop) | ({} if drop else {"seed_ptr": None})
            for prefetch in (False, True) if R == 16 else (True,):
                kinds = dict(one_launch=False, prefetch=prefetch)
                plan = forward_plan(M, N, K, R, 2, dropout, self.device, **kinds)
                if not right_nk:
                    plan = backward_plan(M, N, K, R, 2, dropout, True, True, False, self.device, **kinds)
                given = dict(TMA=self.tma, out_scale=None, **masked)
                self.gemm(what, lora_gemm_kernel, plan.lora_gemm, R, right_nk, thin, **given)
            plan = forward_plan(M, N, K, R, 2, dropout, self.device, one_launch=True)
            if not right_nk:
                plan = backward_plan(M, N, K, R, 2, dropout, True, True, False, self.device, one_launch=True)
            if plan.lora_gemm_shrink is not None:
                self.gemm(what, lora_gemm_shrink_kernel, plan.lora_gemm_shrink, R, right_nk, thin)

    def with_optional_tensors(self, R: int, thin: str, dropout: bool, GATES: int) -> None:
        """All of them at once, and lora_update's kernel."""
        forward = forward_plan(M, N, K, R, 2, dropout, self.device)
        backward = backward_plan(M, N, K, R, 2, dropout, True, True, True, self.device, plain=False)
        what = f"R={R} {thin} dropout={dropout} all"
        masked = dict(DROPOUT=dropout) | ({} if dropout else {"seed_ptr": None})
        low = dict.fromkeys(("low", "h", "h_in", "gated", "dh_out", "dh", "dh_c", "dh_in"), "*bf16")
        wide = dict.fromkeys(("left", "dy", "y", "dz", "bias", "x", "weight", "base", "out"), "*bf16")
        single = dict.fromkeys(("gate", "dgate", "out_scale", "row_scale", "column_scale", "sums", "grad"), "*fp32")
        types = low | wide | single | dict.fromkeys(("thin", "down", "lora_B"), "*" + thin)
        types |= dict(seed_ptr="*i64", lost="*i32", slabs="*fp32")
        common = dict(R=R, PRECISION="ieee")
        gates = dict(GATES=GATES)
        self.compile(what, shrink_kernel, types, **common, **gates, **masked, stride_dk=1, **forward.shrink.constexprs)
        c = backward.low_gradient.constexprs
        self.compile(what, low_gradient_kernel, types, **common, **gates, stride_br=1, **c)
        unmasked = dict(DROPOUT=False, seed_ptr=None)
        c = backward.wgrad_B.constexprs
        self.compile(what, wgrad_kernel, types | dict(out="*fp32"), **common, **unmasked, stride_or=1, **c)
        self.gemm(what, lora_gemm_kernel, forward.lora_gemm, R, True, thin, TMA=self.tma, **unmasked)
        drawn = {} if dropout else {"seed_ptr": None}
        for base in ({}, {"base": None}):
            c = expand_config(M, N, R, 2).constexprs
            self.compile(what, expand_kernel, types, **common, **base, **drawn, stride_tn=1, **c)
        types |= dict(out="*fp32")
        self.compile(what, scale_gradient.sums_kernel, types, **scale_gradient.SUMS_TILE)
        self.compile(what, scale_gradient.columns_kernel, types, **common, stride_br=1, **scale_gradient.COLUMNS_TILE)
        self.compile(what, scale_gradient.select_kernel, types, **scale_gradient.SUMS_TILE)

    def grouped(self, R: int, thin: str, dropout: bool, G: int, mixed: bool) -> None:
        """grouped_lora_update over matrices of different ranks by tables of addresses, or over stacks."""
        what = f"R={R} {thin} dropout={dropout} G={G} mixed={mixed}"
        types = dict.fromkeys(("low", "left", "base"), "*bf16") | dict.fromkeys(("factors", "keep_factors"), "*fp32")
        types |= dict.fromkeys(("offsets", "ranks", "thresholds"), "*i32") | dict.fromkeys(("down", "thin"), "*" + thin)
        types |= dict(table="*i64", rows="*i64", starts="*i64", seed_ptr="*i64", slabs="*fp32")
        none = {} if dropout else dict.fromkeys(("seed_ptr", "thresholds", "keep_factors"))
        none |= {} if mixed else dict.fromkeys(("table", "ranks", "rows", "starts"))
        common = dict(R=R, UNIT=8, BLOCK_G=triton.next_power_of_2(G), ALIGNED=True, PRECISION="ieee")

        def compile(kernel, out: str, **constexprs):
            given = {name: v for name, v in (none | common | constexprs).items() if name in kernel.arg_names}
            given |= {name: v for name, v in constexprs.items() if name.startswith("num_")}
            self.compile(what, kernel, types | dict(out=out), **given)

        shrink = grouped_shrink_config(M, G, K, R, 2, self.device).constexprs
        expand = grouped_expand_config(M, G, N, R, 2).constexprs
        compile(grouped_shrink_kernel, "*bf16", stride_dk=1, **shrink)  # A, in the forward
        compile(grouped_expand_kernel, "*bf16", stride_tn=1, **expand)
        own = dict(stride_dk=None, stride_tn=None) if mixed else {}
        compile(grouped_shrink_kernel, "*bf16", stride_dr=1, **own, **shrink)  # B, in the backward
        compile(grouped_expand_kernel, "*bf16", stride_tr=1, **own, **expand)
        c = grouped_wgrad_config(M, K, R, 2, self.device)
        for transposed in (False, True):
            choices = dict(TRANSPOSED=transposed, ROWS=c.rows_per_split)
            compile(grouped_wgrad_kernel, "*" + thin, **choices, **c.constexprs)
        compile(sum_groups_kernel, "*" + thin, ROWS=c.rows_per_split, **SUM_GROUPS_TILE)

    def everything(self) -> list[dict]:
        # sm_80 is as sm_89 with more shared memory: the least, the middle and the most of it.
        for R, dropout, thin in CASES[::2] if self.target.arch == 80 else CASES:
            what, masked = f"R={R} {thin} dropout={dropout}", dict(DROPOUT=dropout)
            self.thin_kernels(what, R, thin, masked | ({} if dropout else {"seed_ptr": None}))
            self.gemms(what, R, thin, dropout)
        if self.target.arch in (90, "gfx942"):  # a target of each vendor
            self.with_optional_tensors(16, "fp32", True, 2)
            self.grouped(16, "bf16", False, 8, False)
        if self.target.arch == 90:  # the largest
            self.with_optional_tensors(256, "bf16", False, 256)
            self.grouped(64, "fp32", True, 1000, True)
        for more in (True, False):
            types = dict(slabs="*fp32", out="*bf16", more_slabs="*fp32", more_out="*fp32")
            none = {} if more else dict(more_slabs=None, more_out=None)
            self.compile(f"more={more}", sum_slabs_kernel, types, **SUM_TILE, **none)
        return self.rows


if __name__ == "__main__":
    print(json.dumps(Compiler(json.loads(sys.argv[1])).everything()))
