"""The CUDA kernels on an emulated GPU (cuda_emulator/): every product, tail, mask and schedule, without a GPU.

The library's own sources are compiled as C++, with ptx.cuh replaced by the emulator's. Threads run in a random order,
warpgroups are held back and asynchronous copies land late, so a missing wait or a wrong phase shows. What only a GPU
can show (fences, time) stays for a GPU.
"""

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import itertools
import os
import random
import shutil
import subprocess

import pytest
import torch
from emulated_cuda import TOOLKIT, build, build_bringup, compile_file, link
from infinities import check_infinity

from fused_lora import backends, lora_linear
from fused_lora.backends import cuda
from fused_lora.ops import internals
from fused_lora.ops.dropout import dropout_mask
from fused_lora.ops.reference import PLAIN, Gradients
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth

pytestmark = pytest.mark.skipif(
    not (TOOLKIT / "cuda.h").exists() or os.uname().machine != "x86_64",
    reason="needs the CUDA toolkit's headers, on x86-64",
)
SMS = 10


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"))


def install(library, monkeypatch):
    """Puts the CUDA back end on CPU tensors and the emulated device; returns what sets how blocks, copies and
    warpgroups are scheduled; `late`: a cluster comes only when all that are there wait."""
    name = f"{library.parent.name}._C"  # pybind11 hands out one module a name
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    configure = ctypes.CDLL(str(library)).emulator_configure
    monkeypatch.setattr(cuda, "_C", module)
    monkeypatch.setattr(cuda, "refusal", lambda request: None)
    monkeypatch.setattr(cuda, "_sms", lambda index: SMS)
    monkeypatch.setattr(cuda, "current_device", lambda: None)  # a CPU tensor's
    monkeypatch.setattr(cuda, "_target", lambda index: (0, 0))
    monkeypatch.setattr(internals, "empty_on_cuda", lambda *given: internals.empty_on_cpu(*given))

    def schedule(resident_blocks=8, delay=4, freeze=0, seed=1, late=False):
        configure(SMS, resident_blocks, delay, freeze, seed, late)

    schedule()
    return schedule


@pytest.fixture(autouse=True)
def no_remembered_choice():
    """`pick` remembers answers, which are others on the emulated device."""
    backends.pick.cache_clear()
    yield
    backends.pick.cache_clear()


@pytest.fixture
def schedule(library, monkeypatch):
    return install(library, monkeypatch)


def dropout_seed():
    return torch.tensor([1234567890123])


def check(shape, dtype, adapter=None, dropout_p=0.0, needs=(True,) * 4, seed=0, backend="cuda"):
    """Exact without dropout, else within the computed tolerance."""
    if dropout_p == 0.0:
        p = exact_problem(*shape, dtype, adapter, seed=seed)
        assert_exact(run(p, backend=backend, needs=needs), truth(p))
    else:
        p = random_problem(*shape, dtype, adapter, seed=seed)
        masked = dict(dropout_p=dropout_p, seed=dropout_seed())
        assert_close(
            run(p, backend=backend, needs=needs, **masked), run(p, backend="reference", **masked), truth(p, **masked)
        )


# Both tile widths, one tile and several waves of them, rows and columns past the end, every rank tile and number of
# low-rank blocks. Each pair of a shape, a rank and DTYPES is there, not every triple.
SHAPES = [(1, 8, 8), (17, 32, 248), (129, 264, 136), (300, 520, 328), (600, 640, 72)]
RANKS = [1, 12, 16, 32, 33, 64, 100, 256]
DTYPES = [(torch.bfloat16, None), (torch.float16, torch.float32)]


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_integers(schedule, poison, shape, R):
    check((*shape, R), *DTYPES[(SHAPES.index(shape) + RANKS.index(R)) % 2])


@pytest.mark.parametrize("M, rows", [(1, 16), (16, 16), (17, 32), (50, 64), (65, 128), (128, 128)])
def test_small_m(schedule, poison, M, rows):
    """Every row tile, 1 to 8 parts of K, a strip past the end, ranks below and at the tile; late copies and few
    resident blocks."""
    seen = set()
    shapes = [(8, 64, 1), (136, 1000, 16), (264, 136, 12), (392, 1160, 64), (2040, 512, 40), (88, 520, 24)]
    for i, (N, K, R) in enumerate(shapes):
        code = cuda._C.dtype_codes["bfloat16"]
        plan = cuda._C.cuda_forward_plan(M=M, N=N, K=K, R=R, dtype=code, adapter_dtype=code, dropout=False, sms=SMS)
        assert plan["plan"].startswith("small+h_inside") and plan["small"]["rows"] == rows
        seen.add(plan["small"]["splits"])
        schedule(resident_blocks=8 if i % 2 else 2, delay=200, freeze=500, seed=i + 1)
        for dtype, adapter, bias in ((torch.bfloat16, None, True), (torch.float16, torch.float32, False)):
            p = exact_problem(M, N, K, R, dtype, adapter, bias=bias, seed=i)
            assert_exact(run(p, backend="cuda", needs=(False,) * 4), truth(p))
    assert seen == {1, 2, 4, 8}
    p = random_problem(M, 264, 1160, 16, torch.bfloat16)
    assert_close(run(p, backend="cuda", needs=(False,) * 4), run(p, backend="reference", needs=(False,) * 4), truth(p))


# Each value of each field, with each of those beside it that changes the same launch.
PLANS = [
    ("small+h_inside+dx128+dh_inside+wgrad_warpgroup+serial", 64),
    ("y128+h_inside+dx128+dh_inside+wgrad_apart+overlap", 32),
    ("y256+h_inside+dx256+dh_inside+wgrad_warpgroup+serial", 12),
    ("y128+h_shrink+dx256+dh_inside+wgrad_apart+serial", 64),
    ("y256+h_shrink+dx128+dh_shrink+wgrad_apart+overlap", 32),
    ("y128+h_gemm+dx256+dh_shrink+overlap", 12),
    ("y256+h_gemm+dx128+dh_gemm+serial", 64),
    ("y256+h_inside+dx256+dh_gemm+overlap", 32),
    ("h_shrink+dh_shrink+overlap", 100),
    ("h_warps", 16),
    ("h_warps+wgrad_apart+serial", 31),
    ("h_shrink+wgrad_warpgroup+overlap", 64),
    ("y128+h_halves+dx256+dh_halves+serial", 12),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_plan(library, schedule, poison, dropout_p):
    overlapped = ctypes.CDLL(str(library)).emulator_last_launch_overlapped
    masked = dict(dropout_p=dropout_p, seed=dropout_seed() if dropout_p else None)
    for i, (plan, R) in enumerate(PLANS):
        dtype, adapter = ((torch.bfloat16, None), (torch.float16, torch.float32))[i % 2]
        p = exact_problem(65 if "small" in plan else 300, 136, 264, R, dtype, adapter, seed=i)
        if dropout_p and ("small" in plan or "h_gemm" in plan.split("+")):
            with pytest.raises(ValueError, match="plan must not say (small|h_gemm) with dropout"):
                run(p, backend=f"cuda:{plan}", **masked)
            continue
        assert_exact(run(p, backend=f"cuda:{plan}", **masked), truth(p, **masked))
        assert overlapped() == ("serial" not in plan)


# One row of tiles and several, tails of all sizes, 2 to 19 k-blocks either way, so that walks start in the middle and a
# few blocks ahead: a shape, what the plan says beside halves, how many clusters are resident, what is refused.
HALVES = [
    ((17, 136, 72, 16), "dx128+wgrad_apart", 2, "dh_halves refused"),
    ((300, 72, 264, 33), "dx256+wgrad_apart", 2, "h_halves refused"),
    ((129, 136, 328, 64), "y128+dx256", 3, ""),
    ((600, 264, 136, 12), "y256+dx128+h_warps", 3, ""),
    ((300, 1160, 520, 9), "y256+h_warps+wgrad_warpgroup", 2, ""),
    ((600, 328, 1160, 16), "y256+dx256", 4, ""),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_low_in_halves(schedule, poison, dropout_p):
    """Two columns of tiles make h or dh: the right results, the same bits in every schedule, no deadlock."""
    masked = dict(dropout_p=dropout_p, seed=dropout_seed() if dropout_p else None)
    for i, (shape, others, clusters, refused) in enumerate(HALVES):
        plan = "+".join(word for word in ("h_halves", "dh_halves", others) if word not in refused)
        p = exact_problem(*shape, *DTYPES[i % 2], seed=i)
        schedule(2 * clusters, delay=(4, 2000)[i % 2], freeze=500, seed=i + 1, late=i % 3 == 0)
        assert_exact(run(p, backend=f"cuda:{plan}", **masked), truth(p, **masked))
        if refused:
            with pytest.raises(ValueError, match=f"plan must not say {refused.split()[0]} with one column of tiles"):
                run(p, backend=f"cuda:h_halves+dh_halves+{others}", **masked)
    p = random_problem(300, 264, 1160, 16, torch.bfloat16)
    runs = []
    for seed in (1, 2):
        schedule(4 * seed, delay=400, freeze=3000, seed=seed)
        runs.append(run(p, backend="cuda:h_halves+dh_halves", **masked))
        assert_close(runs[-1], run(p, backend="reference", **masked), truth(p, **masked))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in ("y", "h", "dx"))


def test_two_halves_need_two_clusters(schedule, poison):
    """Two tiles wait for each other: where one cluster is resident and no other comes, it waits for ever."""
    p = exact_problem(17, 136, 136, 16, torch.bfloat16)
    for clusters in (2, 1):
        schedule(resident_blocks=2 * clusters, late=True)
        for plan, needs in (("y128+h_halves", False), ("dx128+dh_halves+wgrad_apart", True)):
            with pytest.raises(RuntimeError, match="deadlock") if clusters == 1 else contextlib.nullcontext():
                run(p, backend=f"cuda:{plan}", needs=(needs,) * 4, dropout_p=0.5, seed=dropout_seed())


MASKED_SHAPES = [(17, 32, 248), (300, 264, 520), (600, 64, 640), (600, 520, 328)]
MASKED_RANKS = [16, 31, 64, 100, 256]


@pytest.mark.parametrize("R", MASKED_RANKS)
@pytest.mark.parametrize("shape", MASKED_SHAPES)
def test_dropout(schedule, poison, shape, R):
    check((*shape, R), *DTYPES[(MASKED_SHAPES.index(shape) + MASKED_RANKS.index(R)) % 2], 0.25)


def test_dropout_mask_is_the_reference_mask(schedule):
    """With A = I and W = 0, h is drop(x) itself; with dy = e_n, B = 1 and A = 1, dx is the mask."""
    M, K = 37, 48
    p = random_problem(M, 16, K, K, torch.bfloat16, bias=False)
    p.x.fill_(1.0), p.lora_A.copy_(torch.eye(K)), p.weight.zero_()
    p.scaling = 1.0
    mask = dropout_mask(dropout_seed(), M, K, 0.5, torch.bfloat16)
    assert torch.equal(run(p, backend="cuda", dropout_p=0.5, seed=dropout_seed(), needs=(False,) * 4)["h"], mask)
    p = exact_problem(300, 16, 520, 8, torch.bfloat16, bias=False)
    p.weight.zero_(), p.dy.zero_(), p.lora_A.zero_(), p.lora_B.zero_()
    p.dy[:, 3], p.lora_A[2], p.lora_B[3, 2], p.scaling = 1.0, 1.0, 1.0, 1.0
    dx = run(p, backend="cuda", dropout_p=0.5, seed=dropout_seed(), needs=(True, False, False, False))["dx"]
    assert torch.equal(dx, dropout_mask(dropout_seed(), 300, 520, 0.5, torch.bfloat16))


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_pruning(schedule, poison, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        for i, (needs, R) in enumerate(itertools.product(itertools.product((False, True), repeat=4), (8, 100))):
            check((70, 40, 136, R), torch.bfloat16, (None, torch.float32)[i // 2 % 2], needs=needs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_not_needed_is_not_there(schedule, poison):
    """x is given for dA only and h for dB only, as autograd saves them."""
    p = exact_problem(70, 40, 136, 16, torch.bfloat16)
    exact, h = truth(p), run(p, backend="cuda", needs=(False,) * 4)["h"]
    for need_x, need_A, need_B in itertools.product((False, True), repeat=3):
        x, given_h = p.x if need_A else None, h if need_B else None
        needs = Gradients(x=need_x, lora_A=need_A, lora_B=need_B, bias=False)
        got = cuda.backward(
            p.dy, None, x, p.weight, p.lora_A, p.lora_B, given_h, None, None, p.scaling, 0.0, None, needs, PLAIN, ""
        )
        assert_exact({"dx": got.x, "dA": got.lora_A, "dB": got.lora_B}, exact)


def test_a_device_that_is_not_current_is_made_so(schedule, poison, monkeypatch):
    current = ["another"]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    p = exact_problem(150, 40, 136, 12, torch.bfloat16)
    assert_exact(run(p, backend="cuda"), truth(p))
    assert current == ["another"]


def test_w_is_asked_for_with_dx_only(schedule, poison):
    p = exact_problem(150, 40, 136, 12, torch.bfloat16)
    want, weight = truth(p), p.weight.clone()
    A, B = p.lora_A.requires_grad_(), p.lora_B.requires_grad_()
    y = lora_linear(p.x, weight, A, B, p.scaling, bias=p.bias, backend="cuda")
    weight.untyped_storage().resize_(0)
    dA, dB = torch.autograd.grad(y, (A, B), p.dy)
    assert_exact({"dA": dA, "dB": dB}, want)


def test_outputs_and_workspaces_are_poisoned(schedule, poison):
    assert cuda._empty(3, 8, torch.bfloat16).isnan().all() and cuda._workspace(64).isnan().all()


def test_strided_and_misaligned_inputs(schedule, poison):
    p = exact_problem(150, 40, 136, 12, torch.bfloat16)
    want = truth(p)
    for margin in (8, 3):  # rows that TMA can read, rows that must be copied; NaN around them

        def surrounded(t):
            wide = torch.full((t.shape[0] + 2, t.shape[1] + 2 * margin), float("nan"), dtype=t.dtype)
            wide[1:-1, margin:-margin] = t
            return wide[1:-1, margin:-margin]

        p.x, p.dy = surrounded(p.x), surrounded(p.dy)
        assert_exact(run(p, backend="cuda"), want)

    def from_an_odd_address(t):
        memory = torch.full((t.numel() + 9,), float("nan"), dtype=t.dtype)
        return memory[1 : 1 + t.numel()].view(t.shape).copy_(t)

    ways = [
        lambda t: t.t().contiguous().t(),
        lambda t: t.repeat_interleave(3, 1)[:, ::3],
        from_an_odd_address,  # in one piece, and yet not as TMA reads it
    ]
    for moved in ways:
        p.x, p.dy, p.lora_A, p.lora_B = map(moved, (p.x, p.dy, p.lora_A, p.lora_B))
        p.bias = from_an_odd_address(p.bias)
        assert_exact(run(p, backend="cuda"), want)
    p.x, p.dy = (t[:1, :1].expand(t.shape) for t in (p.x, p.dy))
    assert_exact(run(p, backend="cuda"), truth(p))
    p = exact_problem(1, 40, 136, 12, torch.bfloat16)
    want = truth(p)
    p.x, p.dy = (t.as_strided(t.shape, (3, 1)) for t in (p.x, p.dy))  # a stride that no element takes
    assert_exact(run(p, backend="cuda"), want)


@pytest.mark.parametrize("resident_blocks, delay, freeze", [(8, 400, 3000), (2, 4, 500), (4, 2000, 100)])
def test_hostile_schedules(schedule, poison, resident_blocks, delay, freeze):
    """Few blocks resident at once, late copies, stalled warpgroups: same results, and no deadlock."""
    choose = random.Random(resident_blocks)
    for i in range(10):
        schedule(resident_blocks, delay, freeze, i + 1)
        M, R = choose.choice([64, 129, 257, 600, 900]), choose.choice([1, 9, 16, 32, 64, 72, 256])
        shape = (M, 8 * choose.randint(1, 80), 8 * choose.randint(1, 80), R)
        check(
            shape,
            choose.choice([torch.bfloat16, torch.float16]),
            choose.choice([None, torch.float32]),
            choose.choice([0.0, 0.0, 0.25]),
            backend="cuda:y128+h_single+dh_single" if resident_blocks == 2 and R <= 64 else "cuda",  # halves take two
        )


def test_bitwise_determinism(schedule):
    """The schedule does not show in the results of deterministic mode, and in no other way than in the sums of dA and
    dB without it."""
    p = random_problem(900, 264, 328, 16, torch.bfloat16, torch.float32)
    runs = {True: [], False: []}
    for s in range(6):
        schedule(resident_blocks=4 + s // 2 * 2, delay=100, freeze=1000, seed=s + 1)
        torch.use_deterministic_algorithms(s % 2 == 0)
        try:
            runs[s % 2 == 0].append(run(p, backend="cuda", dropout_p=0.1, seed=dropout_seed()))
        finally:
            torch.use_deterministic_algorithms(False)
    for name in ("y", "h", "dx", "dA", "dB", "dbias"):
        first, *others = runs[True] + (runs[False] if name not in ("dA", "dB") else [])
        assert all(torch.equal(first[name], other[name]) for other in others), name
        assert name not in ("dA", "dB") or not all(torch.equal(first[name], other[name]) for other in runs[False]), (
            f"{name} has an order of summation to fix"
        )


# In the small kernel, lora_gemm, lora_gemm with a GEMM of its own for h, and both kinds of dropout, ranks with padding.
@pytest.mark.parametrize(
    "M, R, dropout_p", [(5, 12, 0.0), (130, 12, 0.0), (130, 100, 0.0), (130, 12, 0.5), (130, 100, 0.5)]
)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias", "dy"])
def test_an_infinity_meets_no_padding(schedule, poison, name, M, R, dropout_p):
    check_infinity("cuda", (M, 40, 136, R), torch.bfloat16, name, dropout_p)


LARGE, SMALL = (600, 520, 328, 16), (65, 136, 1000, 16)
# A kernel file, a wait of it, what stands there instead, and a shape and plan whose result it spoils.
WAITS = [
    # the loader's wait for h; the wait before the staging tile is written again
    ("loader.cuh", "ptx::wait_flag(flag_of(args, r), args.low_columns);", ";", LARGE, ""),
    ("consumer.cuh", "if (thread == 0) ptx::tma_store_wait_read();", "", LARGE, ""),
    # the gradients' waits for h and for dh
    ("gradients.cuh", "ptx::wait(&s.side_full, side_phase);\n        multiply_rows", "multiply_rows", LARGE, ""),
    ("gradients.cuh", "ptx::wait(&s.side_full, side_phase);\n    for", "for", LARGE, ""),
    # the loader's wait before dh takes the place of h
    ("loader.cuh", "ptx::wait(&s.side_empty, side_phase ^ 1);", "", LARGE, ""),
    # column 1's wait for column 0's sums
    ("tiles.cuh", "if (column > 0) wait_for_parts(args, column, row, 64);", "", LARGE, ":h_halves"),
    # the sums' waits for the ring to be through and for the other blocks' sums
    ("small.cu", "__syncthreads();  // the ring is through: the sums take its place", "", SMALL, ""),
    ("small.cu", "ptx::cluster_sync();\n  const int share", "const int share", SMALL, ""),
]


def changed(library, folder, *changes):
    """A copy of the sources and objects in `folder` with other lines in kernel files: (file, line, instead)."""
    shutil.copytree(library.parent / "csrc", folder / "csrc")
    units = set()
    for kernel, line, instead in changes:
        file = folder / "csrc" / "cuda" / "lora_gemm" / kernel
        assert line in file.read_text()
        file.write_text(file.read_text().replace(line, instead))
        units.add(file.with_name("bf16.cu") if file.suffix == ".cuh" else file)
    for unit in units:
        compile_file(folder / "csrc", unit, "-O0")  # two or three launches run sooner than -O2 compiles them


@pytest.mark.parametrize("kernel, line, instead, shape, plan", WAITS)
def test_a_missing_wait_shows(library, tmp_path, monkeypatch, poison, kernel, line, instead, shape, plan):
    """The tests above can fail: the same sources without one wait."""
    changed(library, tmp_path, (kernel, line, instead))
    schedule = install(link(tmp_path), monkeypatch)
    with pytest.raises(
        (AssertionError, RuntimeError), match="elements differ|deadlock|an mbarrier has more arrivals|without fence"
    ):
        for seed in range(1, 11):
            schedule(resident_blocks=8, delay=400, freeze=3000, seed=seed)
            # other values each time: memory used again must not hold the right ones
            check(shape, torch.bfloat16, seed=seed, backend=f"cuda{plan}")


FENCE, GROUP = "ptx::fence_proxy_shared();", "sync_group(kFourth);\n    if (thread == 0) ptx::arrive(&s.side_empty);"
# Faults that results need not show: a kernel file, a line of it, the instance of the kernel where it is left out (or
# another stands there), the rank and dropout of a call that runs it, whether in the backward, what the emulator says.
FAULTS = [
    ("dropped_low.cuh", FENCE, "C::kRank == 32", "", 32, 0.5, False, "a wgmma reads at .* thread .* fence.proxy.async"),
    ("gradients.cuh", FENCE, "true", "", 16, 0.5, True, "a wgmma reads at .* thread .* fence.proxy.async"),
    ("consumer.cuh", FENCE, "C::kMakesLow && C::kRank == 32", "", 32, 0.0, False, "a TMA store at .* fence.proxy"),
    ("tiles.cuh", "ptx::fence_proxy();", "C::kRank == 64 && C::kMakesLow", "", 64, 0.0, False, "a TMA load of global"),
    (
        "loader.cuh",
        "ptx::fence_proxy();",
        "C::kRank == 64 && C::kDropsLeft",
        "",
        64,
        0.5,
        False,
        "load comes after a flag",
    ),
    (
        "kernel.cuh",
        "__syncwarp();",
        "C::kRank == 0",
        "",
        100,
        0.0,
        False,
        "warp 0 comes apart .* __syncwarp is missing",
    ),
    (
        *(
            "gradients.cuh",
            GROUP,
            "!C::kMasked",
            GROUP.replace("sync_group(kFourth)", "ptx::named_barrier(3, 128 - thread / 64 * 32)"),
        ),
        *(16, 0.0, True, "barrier 3 is for"),
    ),
]
FLAGS = """for (int r = at.row; r < min(at.row + kBlockM, args.M); r += 64)
        ptx::wait_flag(flag_of(args, r), args.low_columns);
      ptx::fence_proxy();  // low was written by ordinary stores, TMA reads it
      // Not before the wait, which in halves may be for the tile with the next number.
"""
DRAW = "      if (cta == 0) drawn = atomicAdd(args.control, 1);"
# A number drawn too early, the same way.
EARLY = ("loader.cuh", FLAGS + DRAW, "C::kRank == 16 && C::kRightMN && !C::kGradients", f"{DRAW}\n      {FLAGS}")


def test_the_emulator_sees_faults_that_results_need_not_show(library, tmp_path, monkeypatch):
    """All of them in one build, each in a call of its own."""
    lines = [
        (kernel, line, f"if constexpr ({where}) {{ {instead} }} else {{ {line} }}")
        for kernel, line, where, instead, *_ in (EARLY, *FAULTS)
    ]
    changed(library, tmp_path, *lines)
    schedule = install(link(tmp_path), monkeypatch)
    check((129, 72, 136, 16), torch.bfloat16, needs=(False,) * 4)
    for *_, R, dropout_p, backward, said in FAULTS:
        with pytest.raises(RuntimeError, match=said):
            # for few rows a masked h is shrink's
            plan = "cuda:h_inside" if dropout_p else "cuda"
            check((129, 72, 136, R), torch.bfloat16, None, dropout_p, needs=(backward,) * 4, backend=plan)
    schedule(late=True)  # the cluster that is alone at first draws the tile that its own waits for
    with pytest.raises(RuntimeError, match="deadlock"):
        check((129, 72, 136, 16), torch.bfloat16, needs=(True, False, False, False), backend="cuda:dx128+dh_halves")


def climb(driver, *rungs):
    """What bench/bringup says on these rungs, and its exit status."""
    done = subprocess.run([driver, "--seconds", "120", *rungs], capture_output=True, text=True)
    return done.stdout, done.returncode


def test_bringup_says_which_kernel_is_wrong_and_where(library, tmp_path):
    """bench/bringup, what a GPU runs first: the rungs that take seconds here, over right kernels and over a wrong
    one."""
    said, status = climb(build_bringup(library.parent / "csrc", library.parent), "small", "wgrad", "drivers")
    assert status == 0 and said.count(", 0 wrong\n") == 3 and said.endswith("3 rungs, 0 not right\n"), said
    # every row of the second chunk of 64 columns
    line = "ptx::tma_store(out, s.out[group], at.row, at.col + chunk * 64);"
    changed(library, tmp_path, ("consumer.cuh", line, f"if (at.col + chunk * 64 != 64) {line}"))
    driver = build_bringup(tmp_path / "csrc", library.parent)
    said, status = climb(driver, "base", "small")
    assert status == 1 and said.endswith("2 rungs, 1 not right\n"), said
    assert "y, bf16, M=129 N=136 K=72 R=0, tiles 256 wide: 8256 of 17544 elements wrong\n" in said, said
    assert said.count(" .#.\n") >= 3, "the map of the wrong places"
    assert climb(driver, "bass")[1] == 2
