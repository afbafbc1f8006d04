"""The op's optional tensors on the back ends that take them: each alone and all together, against integers and fp64."""

import itertools

import pytest
import torch

from fused_lora.backends import cpu
from fused_lora.ops.reference import Gradients
from fused_lora.ops.schema import request_of
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth, with_optional

ALL = ("x_lora", "h_in", "gate", "out_scale", "grad_row_scale", "dh")
SETS = [(name,) for name in ALL] + [("h_in", "gate", "dh"), ALL]
DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, None),
    (torch.float16, torch.float32),
]


def ways(p) -> list[str]:
    """The CPU back end in each of its plans for a problem."""
    return [f"cpu:{plan}" for plan in cpu.plans(request_of(p.x, p.weight, p.lora_A, p.variant))]


@pytest.mark.parametrize("names", SETS, ids="+".join)
@pytest.mark.parametrize("R", [1, 8, 16, 64])
def test_exact(poison, names, R):
    """Two panels and blocks of rows with ragged edges, and a size below all of them."""
    for shape, (dtype, adapter) in itertools.product(((100, 385, 392), (9, 33, 40)), DTYPES):
        p = with_optional(exact_problem(*shape, R, dtype, adapter), names, exact=True)
        want = truth(p, needs=p.needs())
        for way in ways(p):
            assert_exact(run(p, backend=way, needs=p.needs()), want)


@pytest.mark.parametrize("names", SETS, ids="+".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_close(poison, names, dropout_p):
    masked = dict(dropout_p=dropout_p, seed=torch.tensor([5]) if dropout_p else None)
    for (shape, gates), (dtype, adapter) in itertools.product(
        (((100, 385, 392, 16), 2), ((29, 96, 53, 12), 12), ((130, 200, 64, 33), 1)), DTYPES
    ):
        p = with_optional(random_problem(*shape, dtype, adapter), names, exact=False, gates=gates)
        expect = run(p, backend="reference", needs=p.needs(), **masked), truth(p, needs=p.needs(), **masked)
        for way in ways(p):
            assert_close(run(p, backend=way, needs=p.needs(), **masked), *expect)


@pytest.mark.parametrize("dtype, adapter", DTYPES[:2])
def test_each_subset_of_gradients(poison, dtype, adapter):
    p = with_optional(exact_problem(37, 40, 48, 8, dtype, adapter), ALL, exact=True, gates=4)
    want = truth(p, needs=p.needs())
    for needs in itertools.product((False, True), repeat=9):
        for way in ways(p):
            assert_exact(run(p, backend=way, needs=Gradients(*needs)), want)


@pytest.mark.parametrize("dtype, adapter", DTYPES)
def test_strided(poison, dtype, adapter):
    """Rows of wider matrices, transposed storage; what lies around them does not leak in. In bf16 it is finite, for
    PyTorch's own product multiplies what follows a row by zero (torch 2.13, CPU with AMX)."""
    p = with_optional(exact_problem(40, 72, 88, 8, dtype, adapter), ALL, exact=True, gates=2)
    want, around = truth(p, needs=p.needs()), float("nan") if dtype is torch.float32 else 99.0

    def inside(t):
        wide = torch.full((t.shape[0] + 2, t.shape[1] + 16), around, dtype=t.dtype)
        wide[1:-1, 8:-8] = t
        return wide[1:-1, 8:-8]

    def turned(t):
        return t.t().contiguous().t()

    optional = p.variant
    for moved in (inside, turned):
        p.x, p.dy, p.dh, p.weight = moved(p.x), moved(p.dy), moved(p.dh), moved(p.weight)
        p.variant = optional._replace(**{n: moved(getattr(optional, n)) for n in ("x_lora", "h_in", "gate")})
        for way in ways(p):
            assert_exact(run(p, backend=way, needs=p.needs()), want)


@pytest.mark.parametrize("M", [0, 1])
def test_no_rows_and_one(poison, M):
    for dtype, adapter in DTYPES:
        p = with_optional(exact_problem(M, 24, 40, 4, dtype, adapter), ALL, exact=True)
        for way in ways(p):
            assert_exact(run(p, backend=way, needs=p.needs()), truth(p, needs=p.needs()))


@pytest.mark.parametrize("names", [("out_scale",), ("x_lora", "out_scale")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_under_dropout(poison, dtype, names):
    """Of several panels and blocks, and of one column."""
    masked = dict(dropout_p=0.25, seed=torch.tensor([5]))
    for shape in ((100, 1056, 1160, 16), (37, 1, 70, 5), (37, 70, 1, 5)):
        p = with_optional(random_problem(*shape, dtype), names, exact=False)
        expect = run(p, backend="reference", needs=p.needs(), **masked), truth(p, needs=p.needs(), **masked)
        p.weight = p.weight.t().contiguous().t()
        for way in ways(p):
            assert_close(run(p, backend=way, needs=p.needs(), **masked), *expect)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_repeat(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for dtype, adapter in DTYPES:
            p = with_optional(random_problem(300, 130, 140, 16, dtype, adapter), ALL, exact=False)
            for way in ways(p):
                first, second = (run(p, backend=way, needs=p.needs()) for _ in range(2))
                assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(before)
