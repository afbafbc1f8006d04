"""The CUDA sources through nvcc, and what the machine code must and must not hold; needs the CUDA toolkit but
no GPU."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine_code import (
    CUOBJDUMP,
    NVCC,
    Product,
    highest_register,
    innermost_loops,
    kernels,
    products,
    reachable,
    successors,
)

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = {source.relative_to(CUDA).with_suffix("").as_posix(): source for source in sorted(CUDA.rglob("*.cu"))}
GEMMS = ("lora_gemm/bf16", "lora_gemm/f16")
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc (the CUDA toolkit)")
needs_disassembler = pytest.mark.skipif(
    NVCC is None or CUOBJDUMP is None, reason="needs nvcc and cuobjdump (the CUDA toolkit, or Triton's copy)"
)


def compile_for(arch: str, source: Path, out: Path) -> SimpleNamespace:
    """One source as machine code for one target, with ptxas's notes."""
    cubin = out / f"{source.stem}.{arch}.cubin"
    command = [NVCC, *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={arch}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    return SimpleNamespace(returncode=done.returncode, notes=done.stdout + done.stderr, cubin=cubin)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{(arch, name of SOURCES): result} of every source for both targets."""
    out = tmp_path_factory.mktemp("cubin")
    names = sorted(SOURCES, key=lambda name: name not in GEMMS)  # those that take longest first
    jobs = [(arch, name) for name in names for arch in ("sm_90a", "sm_80")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: compile_for(job[0], SOURCES[job[1]], out), jobs)
        return dict(zip(jobs, results))


def low_by_warps(kernel: str) -> bool:
    """Whether the loader's idle warps make the masked low of a mangled lora_gemm_kernel."""
    return bool(re.search(r"Li(128|256)ELi\d+E(Lb\dE){3}Lb1E", kernel))


def traits(kernel: str) -> tuple[int, int, bool, bool, bool]:
    """Of a mangled lora_gemm_kernel: columns and rank of a tile, whether backward, with dropout, making dA and dB. What
    the loader's warps make is no part of it: to the rest of the kernel low is given."""
    said = re.search(r"TraitsI\w+?Li(128|256)ELi(\d+)ELb(\d)ELb(\d)ELb(\d)ELb\dE", kernel)
    width, rank, backward, dropout, gradients = map(int, said.groups())
    if low_by_warps(kernel):
        assert width == 256 and rank in (16, 32) and dropout and not backward and not gradients
        return width, 0, False, False, False
    assert not gradients or (backward and rank and (not dropout or width == 128 or rank == 16)), kernel
    return width, rank, bool(backward), bool(dropout), bool(gradients)


def columns_at_once(width: int, backward: bool, dropout: bool, gradients: bool) -> int:
    """Of a product of whole tiles: with four warpgroups ptxas refuses 256."""
    return 128 if gradients or (dropout and not backward) else width


@needs_nvcc
def test_every_source_compiles_for_both_targets(built):
    assert set(SOURCES) >= {*GEMMS, "lora_gemm/small", "shrink", "wgrad", "prepare"}
    for (arch, name), result in built.items():
        assert result.returncode == 0, f"{name} for {arch}:\n{result.notes}"


@needs_nvcc
def test_no_kernel_spills_and_no_wgmma_is_serialised(built):
    for (arch, name), result in built.items():
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.notes)
        assert spills and all(s == ("0", "0") for s in spills), f"{name} for {arch} spills: {spills}"
        assert "wgmma" not in result.notes and "warpgroup.arrive is injected" not in result.notes, (
            f"{name} for {arch}:\n{result.notes}"
        )
        assert "setmaxnreg" not in result.notes, f"{name} for {arch}: setmaxnreg was ignored\n{result.notes}"


@needs_disassembler
@pytest.mark.parametrize("name", GEMMS)
def test_gemm_machine_code(built, name):
    """Each instance: wgmma over the whole tile in its main loops, no local memory, no memory barrier in the loops, TMA
    in and out."""
    found = {k: code for k, code in kernels(built["sm_90a", name].cubin).items() if "lora_gemm_kernel" in k}
    # 2 widths x (4 ranks x (forward, dx, dx through the mask) + 3 x forward of the masked x), and dx with gradients:
    # 2 widths x 3 ranks, through the mask 4 of them; masked x by the loader's warps 2
    assert len(found) == 42
    for kernel, code in found.items():
        instructions = [i for _, i in code]
        assert not [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)], f"{kernel} uses local memory"
        for needed in ("UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "STSM", "USETMAXREG"):
            assert any(needed in i for i in instructions), f"{kernel} has no {needed}"
        width, rank, backward, dropout, gradients = traits(kernel)
        width = columns_at_once(width, backward, dropout, gradients)
        for needed in ("HMMA.16816.F32", "LDSM", "SHFL") * low_by_warps(kernel):
            assert any(needed in i for i in instructions), f"{kernel} has no {needed}"
        assert not gradients or any("REDG.E.ADD.F32" in i for i in instructions), f"{kernel} adds up no gradients"
        loops = [loop for loop in innermost_loops(code, f"HGMMA.64x{width}x16") if sum("HGMMA" in i for i in loop) >= 4]
        assert loops, f"{kernel} has no main loop"
        low = loops if backward or not dropout else [instructions]
        assert not rank or any(f"HGMMA.64x{rank}x16" in i for loop in low for i in loop), (
            f"{kernel} has no main loop that computes h"
        )
        for loop in loops:
            assert not [i for i in loop if "MEMBAR" in i or "FENCE" in i], f"{kernel} has a fence in a main loop"
            assert any("SYNCS" in i for i in loop)


@needs_disassembler
@pytest.mark.parametrize("name", GEMMS)
def test_the_roles_registers_fit_those_at_entry(built, name):
    """setmaxnreg waits for ever where the warpgroups of a block ask for more than the block started with."""
    entry = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", built["sm_90a", name].notes, re.DOTALL))
    for kernel, code in kernels(built["sm_90a", name].cubin).items():
        moves = re.findall(r"USETMAXREG\.(DEALLOC|TRY_ALLOC)\S* (?:UP\d, )?0x(\w+)", "\n".join(i for _, i in code))
        down = [int(registers, 16) for way, registers in moves if way == "DEALLOC"]
        up = [int(registers, 16) for way, registers in moves if way == "TRY_ALLOC"]
        assert len(down) in (1, 2) and len(up) == 1, f"{kernel}: {moves}"
        warpgroups = len(down) + 2  # both that multiply run the same code
        assert sum(down) + 2 * up[0] <= warpgroups * int(entry[kernel]), f"{kernel}: {moves} of {entry[kernel]}"
        assert max(down) <= int(entry[kernel]) <= up[0], f"{kernel}: {moves} of {entry[kernel]}"


@needs_disassembler
@pytest.mark.parametrize("name", GEMMS)
def test_every_role_keeps_to_its_registers(built, name):
    """What runs before a role has its registers uses those at entry, and what runs then its own: a register past them
    belongs to another warp."""
    entry = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", built["sm_90a", name].notes, re.DOTALL))
    for kernel, code in kernels(built["sm_90a", name].cubin).items():
        follow, highest = successors(code), [highest_register(instruction) for _, instruction in code]
        starts = [n for n, (_, instruction) in enumerate(code) if "USETMAXREG" in instruction]
        roles = {n: reachable(follow, n) for n in starts}
        roles[None] = set(range(len(code))).difference(*roles.values())
        for n, part in roles.items():
            allowed = int(entry[kernel]) if n is None else int(re.search(r"0x(\w+)$", code[n][1])[1], 16)
            worst = max(part, key=lambda m: highest[m])
            assert highest[worst] < allowed, f"{kernel}: {code[worst][1]} where a thread has {allowed} registers"
            assert n is None or len(part) > 100, f"{kernel}: only {len(part)} instructions follow {code[n][1]}"


def operand(leading_bytes: int, stride_bytes: int, swizzle_bytes: int) -> tuple[int, int]:
    """A matrix descriptor's leading offset and its high word, by the PTX manual."""
    return leading_bytes // 16, stride_bytes // 16 | {128: 1, 64: 2, 32: 3}[swizzle_bytes] << 30


ROWS = operand(16, 1024, 128)  # K-major: rows of 128 bytes, eight of them 1024


def intended(width: int, rank: int, backward: bool, dropout: bool, gradients: bool) -> set[Product]:
    """The products of an instance of lora_gemm: right operands lie MN-major in the backward, in chunks of 64 columns
    and 64 rows; a rank tile is one chunk of its own width."""
    tile = columns_at_once(width, backward, dropout, gradients)
    chunks, thin = operand(64 * 128, 1024, 128), operand(16, 8 * rank * 2, rank * 2) if rank else None
    if not backward:
        return {Product(n, "", ROWS, ROWS) for n in (tile, rank) if n}
    found = {Product(tile, ".tnspB", ROWS, chunks)}
    if rank:
        found.add(Product(rank, ".tnspB", ROWS, thin))
    if dropout:
        found.add(Product(64, ".tnspB", ROWS, chunks))
    if gradients:
        found.add(Product(rank, ".tnspA.tnspB", chunks, thin))
    return found


@needs_disassembler
@pytest.mark.parametrize("name", [*GEMMS, "lora_gemm/small"])
def test_products_read_their_operands_as_they_lie(built, name):
    """Every wgmma: transposed or not, and the offsets and swizzle of its descriptors."""
    for kernel, code in kernels(built["sm_90a", name].cubin).items():
        if name == "lora_gemm/small":
            want = {Product(int(re.search(r"Li(\d+)E", kernel)[1]), "", ROWS, ROWS)}
        else:
            want = intended(*traits(kernel))
        assert set(products(code)) == want, kernel


@needs_disassembler
def test_small_m_machine_code(built):
    """Each number of rows: four wgmma in the loop over K, a TMA load, reads from the cluster's other blocks, no local
    memory."""
    found = {k: [i for _, i in code] for k, code in kernels(built["sm_90a", "lora_gemm/small"].cubin).items()}
    assert len(found) == 8
    for kernel, instructions in found.items():
        rows = re.search(r"Li(\d+)E", kernel)[1]
        assert sum(f"HGMMA.64x{rows}x16" in i for i in instructions) >= 4 and any(
            "UTMALDG.2D" in i for i in instructions
        ), kernel
        assert any("LD.E.128" in i for i in instructions), f"{kernel} reads no sums of other blocks"
        assert not [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)], f"{kernel} uses local memory"


@needs_disassembler
@pytest.mark.parametrize("name, arch", [("shrink", "sm_90a"), ("wgrad", "sm_80"), ("wgrad", "sm_90a")])
def test_simple_kernels_use_tensor_cores(built, name, arch):
    found = {k: [i for _, i in code] for k, code in kernels(built[arch, name].cubin).items() if f"{name}_kernel" in k}
    assert len(found) == {"shrink": 12, "wgrad": 10}[name]
    for kernel, instructions in found.items():
        for needed in ("HMMA.16816.F32", "LDSM", "LDGSTS"):
            assert any(needed in i for i in instructions), f"{kernel} has no {needed}"
        assert not [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)], f"{kernel} uses local memory"


@needs_disassembler
def test_no_kernel_touches_memory_before_it_has_waited_for_the_one_before(built):
    """A call's kernels may overlap: ACQBULK (griddepcontrol.wait) comes first in each."""
    for name in SOURCES:
        for kernel, code in kernels(built["sm_90a", name].cubin).items():
            order = [re.sub(r"^@!?U?P\d\s+", "", i).split()[0].split(".")[0] for _, i in code]
            touching = {"LD", "LDG", "LDGSTS", "UTMALDG", "ATOMG", "REDG", "RED", "ST", "STG", "UTMASTG"}
            first = next(i for i, operation in enumerate(order) if operation in touching)
            assert "ACQBULK" in order and order.index("ACQBULK") < first, kernel


@needs_disassembler
def test_the_loop_finder_finds_nested_loops():
    code = [
        (0, "MOV"),
        (16, "MEMBAR"),
        (32, "HGMMA a"),
        (48, "@P0 BRA 0x20"),
        (64, "HGMMA b"),
        (80, "@!P1 BRA 0x0"),
        (96, "EXIT"),
    ]
    assert innermost_loops(code, "HGMMA") == [["HGMMA a", "@P0 BRA 0x20"]]
    assert innermost_loops(code, "MEMBAR") == [["MOV", "MEMBAR", "HGMMA a", "@P0 BRA 0x20", "HGMMA b", "@!P1 BRA 0x0"]]


def test_registers_and_constants_are_followed_through_branches():
    """A budget's part ends where its branches end; a descriptor's word comes through moves, pairs and a loop."""
    code = [
        (0, "USETMAXREG.DEALLOC.CTAPOOL 0x28"),
        (16, "@P0 BRA 0x50"),
        (32, "IMAD.MOV.U32 R9, RZ, RZ, -0x7fffffe0"),
        (48, "LDS.128 R36, [R2.64+0x10]"),
        (64, "BRA 0x0"),
        (80, "R2UR UR7, R9"),
        (96, "ULOP3.LUT UR6, UR8, 0x2000000, URZ, 0xfc, !UPT"),
        (112, "UIADD3.64 UR10, UR6, 0x80, URZ"),
        (128, "UMOV UR8, UR10"),
        (144, "UMOV UR9, UR11"),
        (160, "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspB, R24"),
        (176, "@P1 BRA 0xa0"),
        (192, "EXIT"),
        (208, "MOV R200, RZ"),
    ]
    assert reachable(successors(code), 0) == set(range(13)) and reachable(successors(code), 12) == {12}
    assert [highest_register(code[n][1]) for n in (3, 5, 10, 13)] == [39, 9, 39, 200]
    assert products(code) == [Product(32, ".tnspB", (512, 0x80000020), (512, 0x80000020))]


def test_kernel_files_stay_short():
    for path in (path for path in CUDA.rglob("*") if path.is_file()):
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path.name
        head = next(i for i, line in enumerate(lines) if not line.startswith("//"))
        assert 1 <= head <= 25, path.name
