"""pytest-benchmark over the kernels: each product of the op alone, by back end, beside the frozen layer's GEMM of the
same shape.

    pytest bench/bench_kernels.py --benchmark-group-by=group

shrink + lora_gemm is the forward; the backward is pruned to one gradient at a time (each but dB needs dh, one shrink,
too).
"""

import pytest
import torch

from fused_lora.backends import pick
from fused_lora.bench.candidates import candidates_on
from fused_lora.ops.reference import PLAIN, Gradients
from fused_lora.ops.schema import request_of
from fused_lora.testing import assert_close, random_problem, run, truth

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
BACKENDS = (
    [*(name for name in candidates_on("cuda") if name in ("triton", "cuda")), "reference"]
    if GPU
    else ["cpu", "reference"]
)
SHAPES = (
    [(8192, 4096, 4096, 16), (2048, 1024, 4096, 64), (16, 4096, 4096, 16)]
    if GPU
    else [(512, 1024, 1024, 16), (512, 1024, 1024, 64), (16, 1024, 1024, 16)]
)
PRODUCTS = {
    "forward": None,
    "dx": (True, False, False, False),
    "dA": (False, True, False, False),
    "dB": (False, False, True, False),
}


def _timed(benchmark, group, step):
    def synchronized():
        step()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info.update(device=DEVICE, dtype=str(DTYPE), torch=torch.__version__)
    benchmark(synchronized)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M={} N={} K={} R={}".format(*s))
def test_product(benchmark, shape, backend, dropout_p, product):
    p = random_problem(*shape, DTYPE, torch.float32, bias=False, device=DEVICE)
    seed = torch.tensor([1], device=DEVICE) if dropout_p else None
    needs = PRODUCTS[product] or (False,) * 4
    got, same = (run(p, backend=name, dropout_p=dropout_p, seed=seed, needs=needs) for name in (backend, "reference"))
    assert_close(got, same, truth(p, dropout_p=dropout_p, seed=seed))
    common, rest = (p.weight, p.lora_A, p.lora_B), (p.scaling, dropout_p, seed)
    serving, plan = pick(backend, request_of(p.x, p.weight, p.lora_A, PLAIN))
    if PRODUCTS[product] is None:
        step = lambda: serving.forward(p.x, *common, None, *rest, PLAIN, plan)  # noqa: E731
    else:
        gradients = Gradients(x=needs[0], lora_A=needs[1], lora_B=needs[2])
        step = lambda: serving.backward(p.dy, None, p.x, *common, got["h"], None, None, *rest, gradients, PLAIN, plan)  # noqa: E731
    _timed(benchmark, "{} M={} N={} K={}".format(product, *shape), step)


@pytest.mark.parametrize("product", ["forward", "dx"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]], ids=lambda s: "M={} N={} K={}".format(*s))
def test_frozen(benchmark, shape, product):
    p = random_problem(*shape, DTYPE, bias=False, device=DEVICE)
    step = (lambda: p.x @ p.weight.t()) if product == "forward" else (lambda: p.dy @ p.weight)
    assert step().shape == ((p.x if product == "dx" else p.dy).shape)
    _timed(benchmark, "{} M={} N={} K={}".format(product, *shape), step)
