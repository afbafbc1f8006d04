"""What only a GPU can show of its back ends: streams, graphs, other work on the card, synchronisation, memory."""

import dataclasses
import functools

import pytest
import torch

from fused_lora import _C, backends, lora_linear
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# One launch with flags, ranks above its limit, few rows, dropout: each way through the kernels.
CASES = [
    (1000, 512, 256, 16, 0.0),
    (1000, 256, 512, 64, 0.0),
    (300, 512, 256, 100, 0.0),
    (16, 512, 1024, 16, 0.0),
    (600, 256, 512, 16, 0.25),
    (1000, 512, 256, 32, 0.0),  # rank tiles with the swizzle of 64 bytes
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 9.0 (H100, H200)")
    return request.param


exact_problem = functools.lru_cache(16)(exact_problem)  # the large ones take seconds to draw


def problems(case, count=3, dtype=torch.bfloat16):
    """`count` exact problems over the same weights with other x and dy, and what each gives."""
    M, N, K, R, dropout_p = case
    first = exact_problem(M, N, K, R, dtype, device="cuda")
    others = [exact_problem(M, N, K, R, dtype, device="cuda", seed=seed) for seed in range(1, count)]
    made = [first, *(dataclasses.replace(first, x=o.x, dy=o.dy) for o in others)]
    settings = dict(dropout_p=dropout_p, seed=torch.tensor([77], device="cuda") if dropout_p else None)
    if dropout_p:  # a factor of 4/3 makes no integers: 1/(1 - 1/2) does
        settings["dropout_p"] = 0.5
    return made, settings, [truth(p, **settings) for p in made]


# Several tiles for every cluster, the last of them past the end in both directions: 256 and 128 columns wide.
LARGE = [(8232, 2120, 2120, 256), (20008, 136, 264, 128)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("R", [16, 32, 64, 100])
@pytest.mark.parametrize("M, N, K, width", LARGE, ids=["wide", "narrow"])
def test_several_tiles_a_program(name, M, N, K, width, R, dropout_p):
    """The sizes that are timed: exact integers, and the error of dense inputs."""
    if name == "cuda":
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        bf16 = _C.dtype_codes["bfloat16"]
        sizes = dict(M=M, N=N, K=K, R=R, dtype=bf16, adapter_dtype=bf16, dropout=False, sms=sms)
        needs = dict(need_x=True, need_A=True, need_B=True, need_bias=True, deterministic=False)
        both = [_C.cuda_forward_plan(**sizes), _C.cuda_backward_plan(**sizes, **needs)]
        for gemm in (plan["gemm"] for plan in both):
            assert gemm["block_n"] == width and 2 * gemm["row_tiles"] * gemm["col_tiles"] > gemm["grid"], (
                "the case no longer tests what it is for"
            )
    (p,), settings, (exact,) = problems((M, N, K, R, dropout_p), 1)
    assert_exact(run(p, backend=name, **settings), exact)
    for dtype in DTYPES:
        p = random_problem(M, N, K, R, dtype, torch.float32, device="cuda")
        assert_close(run(p, backend=name, **settings), run(p, backend="reference", **settings), truth(p, **settings))


@pytest.mark.parametrize("case", [(8192, 1024, 4096, 16, 0.0), (300, 512, 256, 100, 0.0), *CASES[3:]])
def test_every_plan_that_is_measured(name, case):
    (p,), settings, (exact,) = problems(case, 1)
    M, N, K, R, _ = case
    request = backends.Request(p.x.device, p.x.dtype, p.x.dtype, backends.bucket(M), N, K, R, aligned=True, optional=())
    for candidate in backends.candidates((name,), request):
        assert_exact(run(p, backend=candidate, **settings), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_graph_replays_see_new_inputs(name, case, dtype):
    """No flag, counter, sum or result of an earlier replay is left; the results of each replay are its own."""
    made, settings, exact = problems(case, dtype=dtype)
    p = dataclasses.replace(made[0], x=made[0].x.clone(), dy=made[0].dy.clone())
    assert_exact(run(p, backend=name, **settings), exact[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(p, backend=name, **settings)
    for turn in (1, 2, 0, 0, 1):
        p.x.copy_(made[turn].x), p.dy.copy_(made[turn].dy)
        for result in got.values():
            result.fill_(float("nan"))
        graph.replay()
        assert_exact(got, exact[turn])


@pytest.mark.parametrize("case", CASES)
def test_two_streams_at_once(name, case):
    """Launches that overlap share nothing."""
    made, settings, exact = problems(case, 2)
    for p in made:
        run(p, backend=name, **settings)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in made], []
    for turn in [0, 1] * 15:
        with torch.cuda.stream(streams[turn]):
            results.append((turn, run(made[turn], backend=name, **settings)))
    torch.cuda.synchronize()
    for turn, got in results:
        assert_exact(got, exact[turn])


@pytest.mark.parametrize("case", CASES[:2])
def test_beside_a_kernel_that_holds_the_card(name, case):
    """Blocks that come late, because another stream's kernels hold SMs, are waited for and do not hang those that
    wait."""
    made, settings, exact = problems(case, 1)
    run(made[0], backend=name, **settings)
    big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    other, results = torch.cuda.Stream(), []
    with torch.cuda.stream(other):
        for _ in range(20):
            big @ big
    for _ in range(20):
        results.append(run(made[0], backend=name, **settings))
    torch.cuda.synchronize()
    for got in results:
        assert_exact(got, exact[0])


def test_nothing_synchronises(name):
    p = random_problem(256, 512, 256, 16, torch.bfloat16, device="cuda")
    x, A, B = p.x.requires_grad_(), p.lora_A.requires_grad_(), p.lora_B.requires_grad_()

    def step():
        lora_linear(x, p.weight, A, B, p.scaling, bias=p.bias, dropout_p=0.1, backend=name).backward(p.dy)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_temporary_of_the_size_of_y_or_x(name):
    """Forward and backward together allocate the outputs, M x R elements twice, and what sums of the thin gradients
    take; with dropout, too."""
    M, N, K, R = 8192, 2048, 1024, 16
    p = random_problem(M, N, K, R, torch.bfloat16, bias=False, device="cuda")
    for settings in (dict(), dict(dropout_p=0.1, seed=torch.tensor([1], device="cuda"))):
        run(p, backend=name, **settings)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = run(p, backend=name, **settings)
        peak = torch.cuda.max_memory_allocated() - before
        outputs = sum(t.numel() * t.element_size() for t in got.values() if t is not None)
        assert peak - outputs < M * K * 2 / 2, f"{(peak - outputs) / 2**20:.1f} MiB beyond the outputs"


def test_tensors_on_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = exact_problem(300, 256, 512, 16, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        assert_exact(run(p, backend=name), truth(p))
