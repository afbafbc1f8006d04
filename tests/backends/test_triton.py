"""What the shared back-end tests do not reach of the Triton back end: descriptors, splits over the rows, several tiles
a program, and the plans that configs.py makes on request only."""

import dataclasses
import importlib
import types
import warnings
from pathlib import Path

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora import backends
from fused_lora.backends import triton as backend
from fused_lora.backends import triton_plans
from fused_lora.ops.reference import PLAIN, Gradients
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth
from fused_lora.triton_kernels import device as device_module
from fused_lora.triton_kernels.configs import (
    BackwardPlan,
    Device,
    ForwardPlan,
    GemmConfig,
    WgradConfig,
    backward_plan,
    forward_plan,
    wgrad_config,
)
from fused_lora.triton_kernels.device import facts
from fused_lora.triton_kernels.dy_pass import dy_pass
from fused_lora.triton_kernels.lora_gemm_shrink import lora_gemm_shrink
from fused_lora.triton_kernels.wgrad import sum_slabs

NEEDS = (True, True, True, True)  # dx, dA, dB, dbias
LACKS_TMA = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)


def run_planned(p, forward, backward, *, dropout_p=0.0, seed=None, needs=NEEDS):
    """What `run` computes, by the launches that other plans choose than the back end's own."""
    given = (p.x, p.weight, p.lora_A, p.lora_B)
    y, h = backend.forward(*given, p.bias, p.scaling, dropout_p, seed, PLAIN, "", launches=forward)
    wanted = Gradients(needs[0], False, needs[1], needs[2], needs[3] and p.bias is not None)
    made = backend.backward(
        p.dy, None, *given, h, None, None, p.scaling, dropout_p, seed, wanted, PLAIN, "", launches=backward
    )
    return {"y": y, "h": h, "dx": made.x, "dA": made.lora_A, "dB": made.lora_B, "dbias": made.bias}


def with_tma(plan):
    """The plan for a device with TMA, which the interpreter can pretend to have."""
    return lambda *sizes: plan(*sizes[:-1], sizes[-1]._replace(tma=True))


def block_of(R):
    """One rank block for all of R."""
    return max(16, 1 << (R - 1).bit_length())


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the device decides, and every other test covers its way"
)
@pytest.mark.parametrize("bias", [True, False])
def test_descriptors_where_the_rows_are_aligned(poison, monkeypatch, bias):
    """Tails come from the descriptors' bounds; sizes that no descriptor takes go through pointers."""
    made, real = [], TensorDescriptor.from_tensor
    monkeypatch.setattr(TensorDescriptor, "from_tensor", lambda t, block: made.append(block) or real(t, block))
    for shape, aligned in (((129, 264, 136, 12), True), ((33, 70, 136, 8), False)):
        made.clear()
        p = exact_problem(*shape, torch.float16, bias=bias)
        assert_exact(run_planned(p, with_tma(forward_plan), with_tma(backward_plan)), truth(p))
        assert (len(made) == 6) == aligned


def test_splits_over_the_rows(on_triton, poison):
    """Partial sums of several splits, whose last is shorter, give the exact integers."""
    M, N, K, R = 1100, 40, 48, 24
    p = exact_problem(M, N, K, R, on_triton.dtypes[1], torch.float32, device=on_triton.device)
    config = wgrad_config(M, N, R, 2, facts(p.x.device))
    assert config.splits > 1 and config.rows_per_split * config.splits > M
    assert_exact(run(p, backend="triton"), truth(p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("prefetch", [False, True])
def test_programs_that_walk_over_several_tiles(on_triton, poison, prefetch, dropout_p):
    """Fewer programs than tiles, groups of rows of which the last is not full, ranks of one block and of several."""
    small = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, BLOCK_R=16, GROUP_M=4, programs=3, PREFETCH=prefetch)

    def with_small_tiles(plan):
        def changed(*sizes):
            made = plan(*sizes)
            return made._replace(lora_gemm=dataclasses.replace(made.lora_gemm, **small))

        return changed

    forward, backward = with_small_tiles(forward_plan), with_small_tiles(backward_plan)
    dropout = dict(dropout_p=dropout_p, seed=torch.tensor([7], device=on_triton.device) if dropout_p else None)
    for R in (1, 16, 40):
        p = exact_problem(70, 40, 40, R, on_triton.dtypes[0], torch.float32, device=on_triton.device)
        assert_exact(run_planned(p, forward, backward, **dropout), truth(p, **dropout))


WITHOUT_dB = (True, True, False, True)


def one_launch_config(M, N, R):
    """Small tiles of lora_gemm_shrink, several to a program."""
    gpu = torch.cuda.is_available()
    BLOCK_M, BLOCK_N, BLOCK_K, warps, most = (128, 64, 64, 8, 32) if gpu else (32, 32, 32, 4, 3)
    programs = min(most, -(-M // BLOCK_M) * -(-N // BLOCK_N))
    prefetch = R % 16 == 0
    return GemmConfig(BLOCK_M, BLOCK_N, BLOCK_K, block_of(R), 2, 3, warps, programs, tma=True, PREFETCH=prefetch)


def one_launch_forward(M, N, K, R, itemsize, dropout, device):
    return ForwardPlan(lora_gemm_shrink=one_launch_config(M, N, R))


def one_launch_backward(M, N, K, R, itemsize, dropout, dx, dA, dB, device):
    """dx and dh in one launch, and dA."""
    return BackwardPlan(
        lora_gemm_shrink=one_launch_config(M, K, R), wgrad_A=wgrad_config(M, K, R, itemsize, device) if dA else None
    )


@pytest.mark.skipif(LACKS_TMA, reason="needs TMA")
@pytest.mark.parametrize("M, N, K", [(83, 72, 104), (70, 24, 40), (1, 80, 64)], ids=["tails", "one column", "one row"])
def test_low_in_the_same_launch(on_triton, poison, M, N, K):
    """y and h, dx and dh (seen through dA), by programs that each take several tiles, the first column's first."""
    dtype = torch.float16
    for i, R in enumerate((1, 8, 12, 16, 32)):
        adapter = (dtype, torch.float32)[(i + M) % 2]  # another one at each of the sizes with tails
        p = exact_problem(M, N, K, R, dtype, adapter, device=on_triton.device)
        aligned = R % 8 == 0  # rows of B [N, R] must start on 16 bytes
        backward = one_launch_backward if aligned else backward_plan
        assert_exact(run_planned(p, one_launch_forward, backward, needs=WITHOUT_dB), truth(p))
        if not aligned:
            with pytest.raises(ValueError, match="down must have rows that start on 16 bytes"):
                run_planned(p, one_launch_forward, one_launch_backward, needs=WITHOUT_dB)


@pytest.mark.skipif(LACKS_TMA, reason="needs TMA")
def test_low_in_the_same_launch_gives_the_same_bits(on_triton):
    p = random_problem(83, 72, 104, 16, torch.float16, device=on_triton.device)
    runs = [run_planned(p, one_launch_forward, one_launch_backward, needs=WITHOUT_dB) for _ in range(5)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in ("y", "h", "dx", "dA"))
    same_dtype = run(p, backend="reference", needs=WITHOUT_dB)
    assert_close(runs[0], same_dtype, truth(p))


@pytest.mark.skipif(not torch.cuda.is_available() or LACKS_TMA, reason="needs a GPU with TMA")
def test_flags_belong_to_one_launch():
    """A graph replayed with other inputs finds no flag raised before, and launches on two streams at once share
    none."""
    p = exact_problem(1000, 512, 256, 16, torch.float16, device="cuda")
    inputs = [p.x, exact_problem(1000, 512, 256, 16, torch.float16, device="cuda", seed=1).x]
    exact = [truth(dataclasses.replace(p, x=x)) for x in inputs]

    def forward(x):
        given = (x, p.weight, p.lora_A, p.lora_B, p.bias, p.scaling, 0.0, None, PLAIN, "")
        return dict(zip(("y", "h"), backend.forward(*given, launches=one_launch_forward)))

    x = p.x.clone()
    assert_exact(forward(x), exact[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(x)
    for turn in (1, 0, 1):
        x.copy_(inputs[turn])
        graph.replay()
        assert_exact(captured, exact[turn])
    streams, made = [torch.cuda.Stream(), torch.cuda.Stream()], []
    torch.cuda.synchronize()
    for turn in [0, 1] * 20:
        with torch.cuda.stream(streams[turn]):
            made.append((turn, forward(inputs[turn])))
    torch.cuda.synchronize()
    for turn, got in made:
        assert_exact(got, exact[turn])


def test_an_old_assembler_on_hopper_is_told_once(monkeypatch):
    """By what first asks for a device's facts, whatever their number; not where another assembler is named."""
    fake = types.SimpleNamespace(
        utils=types.SimpleNamespace(
            get_device_properties=lambda index: {"multiprocessor_count": 132, "max_shared_mem": 232448}
        ),
        get_current_target=lambda: types.SimpleNamespace(backend="cuda", arch=90),
    )
    monkeypatch.setattr(
        device_module.triton, "runtime", types.SimpleNamespace(driver=types.SimpleNamespace(active=fake))
    )
    for release, path, times in (
        ("3.6.0+git1", "", 1),
        ("3.6.0+git1", "/usr/bin/ptxas", 0),
        ("3.9.0", "", 0),
        ("3.10rc1", "", 0),
    ):
        monkeypatch.setattr(triton, "__version__", release)
        monkeypatch.setenv("TRITON_PTXAS_PATH", path)
        facts.cache_clear(), device_module.warn_of_an_old_assembler.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert facts(torch.device("cuda", 0)) == facts(torch.device("cuda", 1)) == Device(True, 132, 232448)
        assert len(told) == times and all(
            "install Triton 3.9 or newer, or set TRITON_PTXAS_PATH" in str(w.message) for w in told
        )
    facts.cache_clear(), device_module.warn_of_an_old_assembler.cache_clear()


RANKS = [1, 8, 12, 16, 64, 256]


def small_dy_pass(M, R, splits):
    """Tiles of dy_pass that cut small sizes into several column blocks and splits."""
    rows = -(-M // splits // 16) * 16
    return WgradConfig(16, 32, block_of(R), 2, 4, -(-M // rows), rows)


@pytest.mark.parametrize(
    "turn, M, N, splits",
    [(0, 1, 5, 1), (1, 50, 32, 3), (2, 83, 77, 1), (3, 83, 77, 3)],
    ids=["one", "splits", "blocks", "both"],
)
def test_dy_pass(on_triton, poison, turn, M, N, splits):
    """dh and dB, stored directly or through slabs, with tails in every direction, rows of a wider dy, B transposed in
    memory. Each rank meets the dtypes in turn: another one at each size."""
    kinds = [(d, a) for d in on_triton.dtypes for a in dict.fromkeys((d, torch.float32))]
    for i, R in enumerate(RANKS):
        dtype, adapter = kinds[(i + turn) % len(kinds)]
        p = exact_problem(M, N, 24, R, dtype, adapter, device=on_triton.device)
        want, h = truth(p), run(p, backend="reference")["h"]
        wide = torch.full((M + 2, N + 3), float("nan"), dtype=dtype, device=on_triton.device)
        wide[1:-1, 1:-2] = p.dy
        for dy, lora_B in ((p.dy, p.lora_B), (wide[1:-1, 1:-2], p.lora_B.t().contiguous().t())):
            dh, dB = dy_pass(dy, lora_B, h, p.scaling, small_dy_pass(M, R, splits))
            assert (dh.dtype, dB.dtype) == (dtype, adapter)
            assert_exact({"dh": dh, "dB": dB}, {"dh": p.scaling * p.dy.double() @ p.lora_B.double(), "dB": want["dB"]})


def test_a_rank_block_too_small_is_refused():
    p = exact_problem(33, 32, 24, 40, torch.float16)
    h, small = torch.zeros(33, 40, dtype=torch.float16), dataclasses.replace(small_dy_pass(33, 40, 1), BLOCK_R=32)
    with pytest.raises(ValueError, match="BLOCK_R of at least R = 40; got 32"):
        dy_pass(p.dy, p.lora_B, h, p.scaling, small)
    small = dataclasses.replace(one_launch_config(33, 32, 40), BLOCK_R=32)
    with pytest.raises(ValueError, match="BLOCK_R of at least R = 40; got 32"):
        lora_gemm_shrink(p.x, p.weight, p.lora_A, p.lora_B, None, p.scaling, small, right_nk=True)


def test_dy_pass_gives_the_same_bits(on_triton):
    """Slabs are added in a fixed order, and their number is the config's."""
    p = random_problem(83, 77, 24, 12, on_triton.dtypes[0], device=on_triton.device)
    h, config = run(p, backend="reference")["h"], small_dy_pass(83, 12, 3)
    runs = [dy_pass(p.dy, p.lora_B, h, p.scaling, config) for _ in range(5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


@pytest.mark.parametrize("R", [8, 64])
def test_one_read_of_dy_and_two_give_the_same_values(on_triton, poison, R):
    """Whether the plan is the back end's own, which reads dy once at R = 8 and twice at R = 64, or its opposite."""
    p = exact_problem(65, 40, 48, R, on_triton.dtypes[0], device=on_triton.device)
    plans = []

    def recorded(*sizes):
        plans.append(backward_plan(*sizes))
        return plans[-1]

    def opposite(*sizes):
        apart = backward_plan(*sizes[:8], False, sizes[-1])  # without dB
        wgrad_B = wgrad_config(65, 40, R, p.dy.element_size(), sizes[-1])
        once = backward_plan(*sizes)._replace(dy_pass=small_dy_pass(65, R, 3), shrink=None, wgrad_B=None)
        return once if R > 32 else apart._replace(wgrad_B=wgrad_B)

    for plan in (recorded, opposite):
        assert_exact(run_planned(p, forward_plan, plan), truth(p))
    assert (plans[0].dy_pass is not None) == (R == 8)


@pytest.mark.skipif(LACKS_TMA, reason="needs TMA")
def test_plans_by_name(on_triton, poison, monkeypatch):
    """Every word and what goes together; what cannot be followed is refused by name, and a call whose x no descriptor
    takes has two launches instead of one."""
    if not torch.cuda.is_available():
        for module in (backend, triton_plans):
            monkeypatch.setattr(module, "facts", lambda device: Device(tma=True, sms=4, shared_bytes=232448))
    M, N, K = (8192, 1024, 1024) if torch.cuda.is_available() else (264, 264, 264)
    p = exact_problem(M, N, K, 16, torch.float16, device=on_triton.device)
    request = backends.Request(p.x.device, p.x.dtype, p.x.dtype, backends.bucket(M), N, K, 16, True, ())
    launched, exact = [], truth(p)
    monkeypatch.setattr(backend, "lora_gemm_shrink", lambda *a, **k: launched.append(1) or lora_gemm_shrink(*a, **k))
    words = {"one_launch", "one_launch+two_reads", "no_prefetch", "narrow", "one_read", "two_reads"}
    assert {"", "one_launch", "no_prefetch"} <= set(backend.plans(request)) <= words | {""}
    counts = {"one_launch+one_read": 1, "one_launch+no_prefetch+two_reads": 2, "narrow+one_read+no_prefetch": 0}
    for plan, one_launches in counts.items():
        launched.clear()
        assert_exact(run(p, backend=f"triton:{plan}"), exact)
        assert len(launched) == one_launches, plan
    launched.clear()
    wide = torch.zeros((M, K + 1), dtype=p.x.dtype, device=p.x.device)
    wide[:, 1:] = p.x
    displaced = dataclasses.replace(p, x=wide[:, 1:])
    assert_exact(run(displaced, backend="triton:one_launch+two_reads", needs=(False,) * 4), exact)
    assert not launched
    for plan, says in (
        ("one_read+two_reads", "both"),
        ("2", "of the words one_launch"),
        ("one_launch", "one_launch, which"),
    ):
        with pytest.raises(ValueError, match=f"plan must .*{says}.*; got '"):
            backends.pick(f"triton:{plan}", request._replace(R=64))
    with pytest.raises(ValueError, match="plan must be left out with gate; got 'two_reads'"):
        backends.pick("triton:two_reads", request._replace(optional=("gate",)))


def test_slabs_are_added_in_groups(on_triton):
    """More slabs than are read at once, of two results of different size."""
    slabs = [
        torch.randint(-9, 9, (count, size), device=on_triton.device).float() for count, size in ((19, 700), (5, 1300))
    ]
    outs = [torch.full((s.shape[1],), float("nan"), device=on_triton.device) for s in slabs]
    sum_slabs((slabs[0], outs[0], 0.5), (slabs[1], outs[1], 1.0))
    assert torch.equal(outs[0], slabs[0].sum(0) * 0.5) and torch.equal(outs[1], slabs[1].sum(0))


def test_dropout_with_every_rank_block(on_triton, poison):
    """A rank of several blocks, where the masked update has an accumulator of its own."""
    p = random_problem(40, 48, 56, 72, on_triton.dtypes[0], device=on_triton.device)
    seed = torch.tensor([99], device=on_triton.device)
    got, want = run(p, backend="triton", dropout_p=0.5, seed=seed), truth(p, dropout_p=0.5, seed=seed)
    for name in got:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sweep itself does it there")
def test_the_sweep_refuses_a_wrong_result_and_goes_on(monkeypatch):
    """bench/sweep_triton.py: one group's variants, on a pretended H100, one of them spoilt."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    sweep, variants = importlib.import_module("sweep_triton"), importlib.import_module("triton_variants")
    device = Device(tma=True, sms=132, shared_bytes=232448)
    setting = variants.Setting.of((70, 72, 40, 16), torch.float16, "cpu", device)
    right, rows = sweep.examine(setting, "dh dB")
    assert len(right) == len(rows) > 5 and not any("refused" in row for row in rows)
    monkeypatch.setattr(variants, "dy_pass", lambda *a: (dy_pass(*a)[0], torch.empty((72, 16))))
    right, rows = sweep.examine(setting, "dh dB")
    assert list(right) == ["frozen", "shrink + wgrad"] and all("dB is off" in row["refused"] for row in rows[2:])
