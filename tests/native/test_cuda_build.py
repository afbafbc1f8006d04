"""The CUDA sources through nvcc, and what the machine code must and must not hold; needs the CUDA toolkit but
no GPU."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = {source.relative_to(CUDA).with_suffix("").as_posix(): source for source in sorted(CUDA.rglob("*.cu"))}
GEMMS = ("lora_gemm/bf16", "lora_gemm/f16")
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
NVCC = (
    (os.environ.get("CUDA_HOME") and shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"], "bin"))))
    or shutil.which("nvcc")
    or shutil.which("/usr/local/cuda/bin/nvcc")
)


def _cuobjdump() -> str | None:
    """NVIDIA's disassembler: the toolkit's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", ""), *([str(Path(NVCC).resolve().parent)] if NVCC else [])]
    folders += [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton else []
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


CUOBJDUMP = _cuobjdump()
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


@functools.cache
def kernels(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """{mangled name: [(address, instruction)]} of a cubin."""
    # cuobjdump calls nvdisasm beside it
    env = os.environ | {"PATH": f"{Path(CUOBJDUMP).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    text = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True, env=env).stdout
    found = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", function)
        found[function.split("\n", 1)[0].strip()] = [(int(address, 16), instruction) for address, instruction in lines]
    return found


def innermost_loops(code: list[tuple[int, str]], holding: str) -> list[list[str]]:
    """The instructions of every loop that holds `holding` and no smaller such loop: from a conditional backward
    branch's target to the branch.

    Unconditional backward branches lead back from spin loops, which ptxas moves to the end of a kernel.
    """
    spans = []
    for address, instruction in code:
        branch = re.match(r"@!?U?P\d\s+BRA\s+0x([0-9a-f]+)", instruction)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    spans = [(lo, hi) for lo, hi in spans if any(lo <= a <= hi and holding in i for a, i in code)]
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[i for a, i in code if lo <= a <= hi] for lo, hi in sorted(set(inner))]


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
    # 2 widths x 3 ranks, through the mask 4 of them
    assert len(found) == 40
    for kernel, code in found.items():
        instructions = [i for _, i in code]
        assert not [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)], f"{kernel} uses local memory"
        for needed in ("UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "STSM", "USETMAXREG"):
            assert any(needed in i for i in instructions), f"{kernel} has no {needed}"
        traits = r"TraitsI\w+?Li(128|256)ELi(\d+)ELb(\d)ELb(\d)E\w*?GradientsByE(\d)E"
        width, rank, backward, dropout, gradients = (int(n) for n in re.search(traits, kernel).groups())
        fits = backward and rank and (not dropout or width == 128 or rank == 16)
        assert fits or not gradients, kernel
        four = gradients or (dropout and not backward)  # warpgroups, for which ptxas refuses products of 256 columns
        width = 128 if four else width
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
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", ["shrink", "wgrad"])
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


def test_kernel_files_stay_short():
    for path in (path for path in CUDA.rglob("*") if path.is_file()):
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path.name
        head = next(i for i, line in enumerate(lines) if not line.startswith("//"))
        assert 1 <= head <= 25, path.name
