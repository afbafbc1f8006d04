"""What the shared back-end tests do not reach of the Triton back end: descriptors, splits over the rows, several tiles
a program."""

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from fused_lora.backends import triton as backend
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth
from fused_lora.triton_kernels import configs


@pytest.fixture
def device_with(monkeypatch):
    """Make the interpreter pretend to be another device."""

    def replace(**properties):
        real = backend._device(torch.device("cpu"))
        monkeypatch.setattr(backend, "_device", lambda device: dataclasses.replace(real, **properties))

    return replace


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the device decides, and every other test covers its way"
)
@pytest.mark.parametrize("bias", [True, False])
def test_descriptors_where_the_rows_are_aligned(poison, device_with, monkeypatch, bias):
    """Tails come from the descriptors' bounds; sizes that no descriptor takes go through pointers."""
    device_with(tma=True)
    made = []
    real = backend.TensorDescriptor.from_tensor
    monkeypatch.setattr(backend.TensorDescriptor, "from_tensor", lambda t, block: made.append(block) or real(t, block))
    for shape, aligned in (((129, 264, 136, 12), True), ((33, 70, 136, 8), False)):
        made.clear()
        p = exact_problem(*shape, torch.float16, bias=bias)
        assert_exact(run(p, backend="triton"), truth(p))
        assert (len(made) == 6) == aligned


def test_splits_over_the_rows(on_triton, poison):
    """Partial sums of several splits, whose last is shorter, give the exact integers."""
    M, N, K, R = 1100, 40, 48, 24
    p = exact_problem(M, N, K, R, on_triton.dtypes[1], torch.float32, device=on_triton.device)
    config = configs.wgrad_config(M, N, R, 2, backend._device(p.x.device))
    assert config.splits > 1 and config.rows_per_split * config.splits > M
    assert_exact(run(p, backend="triton"), truth(p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("prefetch", [False, True])
def test_programs_that_walk_over_several_tiles(on_triton, poison, monkeypatch, prefetch, dropout_p):
    """Fewer programs than tiles, groups of rows of which the last is not full, ranks of one block and of several."""
    real, small = (
        configs.gemm_config,
        dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, BLOCK_R=16, GROUP_M=4, programs=3, PREFETCH=prefetch),
    )
    monkeypatch.setattr(configs, "gemm_config", lambda *a: dataclasses.replace(real(*a), **small))
    seed = torch.tensor([7], device=on_triton.device) if dropout_p else None
    for R in (1, 16, 40):
        p = exact_problem(90, 72, 40, R, on_triton.dtypes[0], torch.float32, device=on_triton.device)
        assert_exact(run(p, backend="triton", dropout_p=dropout_p, seed=seed), truth(p, dropout_p=dropout_p, seed=seed))


@pytest.fixture
def one_launch(device_with, monkeypatch):
    """lora_gemm_shrink with small tiles wherever the operands allow it; the list grows by one at each of its
    launches."""
    calls, real = [], backend._lora_gemm_shrink
    if not torch.cuda.is_available():
        device_with(tma=True)

    def small(M, N, K, R, itemsize, device):
        BLOCK_M, BLOCK_N, BLOCK_K, warps, most = (
            (128, 64, 64, 8, 32) if torch.cuda.is_available() else (32, 32, 32, 4, 3)
        )
        programs = min(most, -(-M // BLOCK_M) * -(-N // BLOCK_N))
        return configs.GemmConfig(
            BLOCK_M, BLOCK_N, BLOCK_K, max(16, 1 << (R - 1).bit_length()), 2, 3, warps, programs, PREFETCH=R % 16 == 0
        )

    monkeypatch.setattr(configs, "gemm_shrink_config", small)
    monkeypatch.setattr(backend, "_lora_gemm_shrink", lambda *a: calls.append(a) or real(*a))
    return calls


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs TMA")
@pytest.mark.parametrize("M, N, K", [(83, 72, 104), (70, 24, 40), (1, 80, 64)], ids=["tails", "one column", "one row"])
def test_low_in_the_same_launch(on_triton, poison, one_launch, M, N, K):
    """y and h, dx and dh (seen through dA), by programs that each take several tiles, the first column's first."""
    dtype = torch.float16
    for R, adapter in itertools.product((1, 8, 12, 16, 32), (dtype, torch.float32)):
        p = exact_problem(M, N, K, R, dtype, adapter, device=on_triton.device)
        one_launch.clear()
        assert_exact(run(p, backend="triton", needs=(True, True, False, True)), truth(p))
        assert len(one_launch) == (2 if R % 8 == 0 else 1), "rows of B must be multiples of 16 bytes for TMA"


def test_low_in_the_same_launch_gives_the_same_bits(on_triton, one_launch):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    p = random_problem(83, 72, 104, 16, torch.float16, device=on_triton.device)
    runs = [run(p, backend="triton", needs=(True, True, False, True)) for _ in range(5)]
    assert len(one_launch) == 10
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in ("y", "h", "dx", "dA"))
    same_dtype = run(p, backend="reference", needs=(True, True, False, True))
    assert_close(runs[0], same_dtype, truth(p))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with TMA"
)
def test_flags_belong_to_one_launch(one_launch):
    """A graph replayed with other inputs finds no flag raised before, and launches on two streams at once share
    none."""
    p = exact_problem(1000, 512, 256, 16, torch.float16, device="cuda")
    inputs = [p.x, exact_problem(1000, 512, 256, 16, torch.float16, device="cuda", seed=1).x]
    exact = [truth(dataclasses.replace(p, x=x)) for x in inputs]
    forward = lambda x: dict(
        zip(("y", "h"), backend.forward(x, p.weight, p.lora_A, p.lora_B, p.bias, p.scaling, 0.0, None))
    )
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
    assert len(one_launch) == 42


def test_dropout_takes_two_launches(on_triton, one_launch):
    p, seed = (
        exact_problem(40, 48, 64, 16, torch.float16, device=on_triton.device),
        torch.tensor([5], device=on_triton.device),
    )
    assert_exact(run(p, backend="triton", dropout_p=0.5, seed=seed), truth(p, dropout_p=0.5, seed=seed))
    assert not one_launch


RANKS = [1, 8, 12, 16, 64, 256]


def small_dy_pass(M, R, splits):
    """Tiles of dy_pass that cut small sizes into several column blocks and splits."""
    rows = -(-M // splits // 16) * 16
    return configs.ThinConfig(16, 32, max(16, 1 << (R - 1).bit_length()), 2, 4, -(-M // rows), rows)


@pytest.mark.parametrize(
    "M, N, splits", [(1, 5, 1), (50, 32, 3), (83, 77, 1), (83, 77, 3)], ids=["one", "splits", "blocks", "both"]
)
def test_dy_pass(on_triton, poison, M, N, splits):
    """dh and dB, stored directly or through slabs, with tails in every direction, rows of a wider dy, B transposed in
    memory."""
    for R, (dtype, adapter) in itertools.product(RANKS, [(d, a) for d in on_triton.dtypes for a in {d, torch.float32}]):
        p = exact_problem(M, N, 24, R, dtype, adapter, device=on_triton.device)
        want, h = truth(p), run(p, backend="reference")["h"]
        wide = torch.full((M + 2, N + 3), float("nan"), dtype=dtype, device=on_triton.device)
        wide[1:-1, 1:-2] = p.dy
        for dy, lora_B in ((p.dy, p.lora_B), (wide[1:-1, 1:-2], p.lora_B.t().contiguous().t())):
            dh, dB = backend._dy_pass(dy, lora_B, h, p.scaling, small_dy_pass(M, R, splits))
            assert (dh.dtype, dB.dtype) == (dtype, adapter)
            assert_exact({"dh": dh, "dB": dB}, {"dh": p.scaling * p.dy.double() @ p.lora_B.double(), "dB": want["dB"]})


def test_dy_pass_gives_the_same_bits(on_triton):
    """Slabs are added in a fixed order, and their number is the config's."""
    p = random_problem(83, 77, 24, 12, on_triton.dtypes[0], device=on_triton.device)
    h, config = run(p, backend="reference")["h"], small_dy_pass(83, 12, 3)
    runs = [backend._dy_pass(p.dy, p.lora_B, h, p.scaling, config) for _ in range(5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


@pytest.mark.parametrize("dx, dA, dB, calls", [(1, 1, 1, 1), (1, 0, 1, 1), (0, 1, 1, 1), (1, 1, 0, 0), (0, 0, 1, 0)])
def test_dy_is_read_once_where_both_results_are_needed(on_triton, poison, monkeypatch, dx, dA, dB, calls):
    p = exact_problem(65, 40, 48, 8, on_triton.dtypes[0], device=on_triton.device)
    counted, real = [], backend._dy_pass
    monkeypatch.setattr(backend, "_dy_pass", lambda *a: counted.append(1) or real(*a))
    assert_exact(run(p, backend="triton", needs=(dx, dA, dB, False)), truth(p))
    assert len(counted) == calls


def test_large_ranks_read_dy_twice(on_triton, poison, monkeypatch):
    """Where the slabs would cost too much, shrink and wgrad serve, with the same values."""
    p = exact_problem(65, 40, 48, 64, on_triton.dtypes[0], device=on_triton.device)
    monkeypatch.setattr(backend, "_dy_pass", None)
    assert_exact(run(p, backend="triton"), truth(p))


def test_slabs_are_added_in_groups(on_triton):
    """More slabs than are read at once, of two results of different size."""
    slabs = [
        torch.randint(-9, 9, (count, size), device=on_triton.device).float() for count, size in ((19, 700), (5, 1300))
    ]
    outs = [torch.full((s.shape[1],), float("nan"), device=on_triton.device) for s in slabs]
    backend._sum_slabs([(slabs[0], outs[0], 0.5), (slabs[1], outs[1], 1.0)])
    assert torch.equal(outs[0], slabs[0].sum(0) * 0.5) and torch.equal(outs[1], slabs[1].sum(0))


def test_dropout_with_every_rank_block(on_triton, poison):
    """A rank of several blocks, where the masked update has an accumulator of its own."""
    p = random_problem(40, 48, 56, 72, on_triton.dtypes[0], device=on_triton.device)
    seed = torch.tensor([99], device=on_triton.device)
    got, want = run(p, backend="triton", dropout_p=0.5, seed=seed), truth(p, dropout_p=0.5, seed=seed)
    for name in got:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sweep itself does it there")
def test_the_sweep_refuses_a_wrong_result_and_goes_on(device_with, monkeypatch):
    """bench/sweep_triton.py: one group's variants, on a pretended H100, one of them spoilt."""
    path = Path(__file__).parents[2] / "bench" / "sweep_triton.py"
    spec = importlib.util.spec_from_file_location("sweep_triton", path)
    monkeypatch.setitem(sys.modules, "sweep_triton", sweep := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sweep)
    device_with(tma=True, sms=132, shared_bytes=232448)
    setting = sweep.Setting.of((70, 72, 40, 16), torch.float16, "cpu", backend._device(torch.device("cpu")))
    right, rows = sweep.examine(setting, "dh dB")
    assert len(right) == len(rows) > 5 and not any("refused" in row for row in rows)
    real = backend._dy_pass
    monkeypatch.setattr(backend, "_dy_pass", lambda *a: (real(*a)[0], torch.empty((72, 16))))
    right, rows = sweep.examine(setting, "dh dB")
    assert list(right) == ["frozen", "shrink + wgrad"] and all("dB is off" in row["refused"] for row in rows[2:])
