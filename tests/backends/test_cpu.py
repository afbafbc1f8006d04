"""The CPU back end's own corners: both base products, PyTorch's and lora_gemm, around their panels, blocks and
threads."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from fused_lora import _C, lora_linear
from fused_lora.backends import cpu, cpu_product
from fused_lora.ops import internals
from fused_lora.ops.grouped_linear import grouped_lora_linear
from fused_lora.ops.reference import PLAIN, Gradients
from fused_lora.ops.schema import request_of
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth, with_optional


@pytest.fixture(params=["inside", "around"])
def planned(request):
    """Names the back end with a plan, whichever this machine prefers, for a problem; with its only plan where that
    serves it alone."""

    def name(p):
        plans = cpu.plans(request_of(p.x, p.weight, p.lora_A, PLAIN))
        return f"cpu:{request.param if request.param in plans else plans[0]}"

    return name


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Around panels of 384 columns, strips of 12 and blocks of 96 rows; more than one of each, whole and ragged. Not rank 1:
# PyTorch's product is then a matrix by a vector, with errors of its own kind (test_gemm_tails has it, exactly).
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(96, 384, 768, 16), (100, 385, 770, 12), (391, 800, 416, 33), (25, 1153, 383, 4)])
def test_panels_and_blocks(poison, planned, shape, dropout_p):
    seed = torch.tensor([5]) if dropout_p else None
    for dtype, adapter in (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        if dropout_p == 0.0:
            p = exact_problem(*shape, dtype, adapter)
            assert_exact(run(p, backend=planned(p)), truth(p))
        p = random_problem(*shape, dtype, adapter)
        masked = dict(dropout_p=dropout_p, seed=seed)
        assert_close(run(p, backend=planned(p), **masked), run(p, backend="reference", **masked), truth(p, **masked))


# Register tiles of 1 to 12 rows, panels of 32 columns, and blocks, each with a neighbour above and below: of 512
# columns and 384 steps of K and R together in fp32 (lora_gemm), of 384 columns and 512 pairs of K in bf16 (bf16_gemm).
# A rank that begins a block, ranks that fill one, and ranks at each of the strides that bf16_gemm knows.
@pytest.mark.parametrize("M", [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 21, 37])
@pytest.mark.parametrize("N, K", [(1, 1), (31, 33), (64, 7), (321, 385), (513, 384), (1056, 1160)])
def test_gemm_tails(poison, planned, M, N, K):
    for dtype in (torch.float32, torch.bfloat16):
        for R, bias in ((1, True), (3, True), (16, False), (21, False), (60, True), (400, True)):
            p = exact_problem(M, N, K, R, dtype, bias=bias)
            assert_exact(run(p, backend=planned(p)), truth(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_gemm_threads(poison, threads, planned, count, dtype):
    """Tasks over columns and, where these run out, over rows; an element's sum has one order whatever the tasks are."""
    p, narrow = random_problem(260, 400, 700, 8, dtype), exact_problem(400, 40, 24, 8, dtype)
    one = run(p, backend=planned(p))
    threads(count)
    assert_exact(run(narrow, backend=planned(narrow)), truth(narrow))
    many = run(p, backend=planned(p))
    assert torch.equal(one["y"], many["y"]) and torch.equal(one["dx"], many["dx"])


# bf16_gemm: two runs of 1536 rows where the sums of more than one block of K wait in between.
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_runs_of_rows_in_bf16(poison, planned, dropout_p):
    p = exact_problem(1550, 40, 1100, 5, torch.bfloat16)
    assert_exact(run(p, backend=planned(p)), truth(p))
    p, masked = random_problem(1550, 1100, 40, 5, torch.bfloat16), dict(dropout_p=dropout_p, seed=torch.tensor([5]))
    expect = run(p, backend="reference", **masked), truth(p, **masked)
    assert_close(run(p, backend=planned(p), **masked), *expect)


# AMX: several walks over rows (8 MiB of x each) and chunks of 1024 steps with edges; several groups of 256 columns and
# two steps of ranks.
@pytest.mark.skipif(not _C.cpu_features()["amx"], reason="needs a CPU with AMX-BF16")
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1100, 40, 4200, 5), (70, 1100, 1056, 40)])
def test_amx_walks_chunks_and_groups(poison, threads, shape, count):
    threads(count)
    p = exact_problem(*shape, torch.bfloat16, torch.float32)
    assert_exact(run(p, backend="cpu:inside"), truth(p))
    p, masked = random_problem(*shape, torch.bfloat16), dict(dropout_p=0.25, seed=torch.tensor([5]))
    expect = run(p, backend="reference", **masked), truth(p, **masked)
    for plan in ("inside", "around"):
        assert_close(run(p, backend=f"cpu:{plan}", **masked), *expect)


def strided(weight):
    """A weight as rows of a wider matrix and as columns of one, transposed, and with every other column of one. What
    lies around it is NaN in fp32, and finite in bf16, where PyTorch's own product multiplies it by zero."""
    around = float("nan") if weight.dtype is torch.float32 else 99.0
    N, K = weight.shape
    wide, tall = weight.new_full((N + 2, K + 16), around), weight.new_full((K + 2, N + 16), around)
    apart = weight.new_full((N, 2 * K), around)
    views = wide[1:-1, 8:-8], tall[1:-1, 8:-8].t(), weight.new_empty(K, N).t(), apart[:, ::2]
    for view in views:
        yield view.copy_(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 70, 90, 8), (4, 31, 1, 3), (37, 1056, 1160, 60), (25, 513, 385, 400)])
def test_strided_weight(poison, planned, dtype, shape):
    """What lies around it must not leak in; dropout, and DoRA's scale of its rows, come to it as it lies, too."""
    p = exact_problem(*shape, dtype)
    q = with_optional(exact_problem(*shape, dtype), ("out_scale", "h_in"), exact=True)
    r, masked = random_problem(*shape, dtype), dict(dropout_p=0.25, seed=torch.tensor([5]))
    wants = truth(p), truth(q, needs=q.needs())
    expect = run(r, backend="reference", **masked), truth(r, **masked)
    for views in zip(strided(p.weight), strided(q.weight), strided(r.weight)):
        p.weight, q.weight, r.weight = views
        assert_exact(run(p, backend=planned(p)), wants[0])
        assert_exact(run(q, backend=planned(q), needs=q.needs()), wants[1])
        assert_close(run(r, backend=planned(r), **masked), *expect)


def test_a_row_of_y_does_not_depend_on_the_others():
    """lora_gemm and few_rows sum each element in one order, in whatever register tile it falls."""
    p = random_problem(100, 97, 800, 8)
    few, more = _C.few_rows, _C.few_rows + 1

    def y(rows):
        given = p.weight, p.lora_A, p.lora_B, p.scaling
        return lora_linear(p.x[rows], *given, bias=p.bias, backend="cpu:inside")

    whole = y(slice(None))
    for rows in (slice(0, more), slice(7, 50), slice(60, 100)):
        assert torch.equal(y(rows), whole[rows])
    whole = y(slice(few))
    for rows in (slice(0, 1), slice(3, 7), slice(0, 11), slice(few - 5, few)):
        assert torch.equal(y(rows), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_y_is_the_base_layer_where_B_is_zero(planned, dtype):
    """Bit for bit with PyTorch's product; with lora_gemm y does not depend on A, and is F.linear's up to the order of
    its sums."""
    p, other = random_problem(33, 400, 800, 8, dtype), random_problem(33, 400, 800, 8, dtype, seed=1)
    zero = torch.zeros_like(p.lora_B)
    given = dict(bias=p.bias, backend=planned(p))
    y = lora_linear(p.x, p.weight, p.lora_A, zero, p.scaling, **given)
    assert torch.equal(y, lora_linear(p.x, p.weight, other.lora_A, zero, p.scaling, **given))
    frozen, exact = F.linear(p.x, p.weight, p.bias), F.linear(p.x.double(), p.weight.double(), p.bias.double())
    assert_close({"y": y}, {"y": frozen}, {"y": exact})
    if planned(p) == "cpu:around":
        assert torch.equal(y, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lies", ["every other", "one for all"])
def test_a_bias_that_lies_in_pieces(poison, planned, dtype, lies):
    """Between its elements are NaNs, and nothing is behind the one that stands for all."""
    for M in (1, 2, 64):
        p = exact_problem(M, 48, 32, 4, dtype)
        if lies == "every other":
            p.bias = torch.full((96,), torch.nan, dtype=dtype)[::2].copy_(p.bias)
        else:
            p.bias = p.bias[:1].clone().expand(48)
        assert p.bias.stride(0) != 1
        assert_exact(run(p, backend=planned(p)), truth(p))
        gated = with_optional(p, ("gate",), exact=True)
        assert_exact(run(gated, backend="auto"), truth(gated))
        segments = torch.tensor([0, M])
        y = grouped_lora_linear(p.x, p.weight, p.bias, [p.lora_A], [p.lora_B], [p.scaling], segments, None, [0.0])
        assert torch.equal(y, truth(p)["y"].to(dtype))


def test_onednn_is_left_alone_where_it_is_switched_off(monkeypatch):
    calls, p = [], random_problem(8, 16, 24, 4, torch.bfloat16)
    monkeypatch.setattr(
        internals, "_bf16_linear", lambda x, weight, bias, *_: calls.append(x) or F.linear(x, weight, bias)
    )
    run(p, backend="cpu:around")
    assert len(calls) == 1
    torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags(enabled=False) does
    try:
        run(p, backend="cpu:around")
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert len(calls) == 1


def _door(**other):
    """The keywords of a call of cpu_forward that updates y [2, 4]."""
    given = dict(x=torch.ones(2, 3), W=None, A=torch.ones(5, 3), B=torch.ones(4, 5), bias=None)
    given |= dict(h=torch.empty(2, 5), y=torch.zeros(2, 4), scaling=1.0, dropout=(0, 0), threads=1)
    return given | dict(x_lora=None, h_in=None, gate=None, out_scale=None) | other


def test_the_door_takes_each_keyword_once():
    """A missing, unknown, positional or unfit argument is a TypeError, and what the kernels refuse a ValueError."""
    good = _door()
    _C.cpu_forward(**good)
    _C.cpu_forward(**dict(reversed(good.items())))
    assert torch.equal(good["y"], torch.full((2, 4), 30.0))
    for name in good:
        with pytest.raises(TypeError, match=f"{name} is missing"):
            _C.cpu_forward(**{k: v for k, v in good.items() if k != name})
    with pytest.raises(TypeError, match="z is not a keyword"):
        _C.cpu_forward(**good, z=1)
    with pytest.raises(TypeError, match="by keyword"):
        _C.cpu_forward(*good.values())
    unfit = dict(x=0, W=(0, 0), A=torch.ones(5, 3).double(), y=torch.ones(4, 2).t(), h=good["h"].to("meta"))
    unfit |= dict(gate=torch.ones(2, 1).bfloat16(), bias=torch.ones(4).numpy(), x_lora=torch.ones(3))
    unfit |= dict(scaling="1", threads=1.5, dropout=(0, -1))
    for name, value in (*unfit.items(), ("threads", 1 << 31), ("dropout", 0), ("y", torch.ones(4, dtype=torch.int32))):
        with pytest.raises(TypeError, match=f"{name} does not take"):
            _C.cpu_forward(**good | {name: value})
    freed = torch.ones(5, 3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="A does not take this Tensor"):
        _C.cpu_forward(**good | dict(A=freed))
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # for a copy of so much
        _C.cpu_forward(**good | dict(W=torch.ones(1, 1).expand(2**24, 2**24)))
    half = dict(x=good["x"].half(), h=good["h"].half(), y=good["y"].half())
    for bad in (dict(A=torch.ones(0, 3), B=torch.ones(4, 0)), half | dict(B=good["B"].bfloat16())):
        with pytest.raises(ValueError, match="must be"):
            _C.cpu_forward(**good | bad)


def test_tensors_that_lie_otherwise_are_taken_as_they_are_or_copied():
    """Rows apart in memory are read where they lie, columns that are apart are not; None of it can be told from y."""
    torch.manual_seed(0)
    x, A, B, W, g = (torch.randint(-4, 5, size).float() for size in ((3, 6), (5, 6), (4, 5), (4, 6), (4,)))

    def y_of(**given):
        call = _door(x=x, A=A, B=B, W=W, out_scale=g, h=torch.empty(3, 5), y=torch.empty(3, 4)) | given
        _C.cpu_forward(**call)
        return call["y"]

    expected = y_of()
    assert torch.equal(expected, ((x @ W.T) + x @ A.T @ B.T) * g)
    nan = torch.nan
    rows, columns = torch.full((3, 9), nan), torch.full((3, 12), nan)
    rows[:, :6], columns[:, ::2] = x, x
    for name, other in (("x", rows[:, :6]), ("x", columns[:, ::2]), ("x", x.t().contiguous().t()), ("x_lora", x)):
        assert torch.equal(y_of(**{name: other}), expected), name
    for name, t in (("A", A), ("B", B), ("W", W)):
        assert torch.equal(y_of(**{name: t.t().contiguous().t()}), expected), name
    scattered = torch.full((8,), nan)
    scattered[::2] = g
    assert torch.equal(y_of(out_scale=scattered[::2]), expected)
    empty = y_of(x=x[:0].expand(0, 6), h=torch.empty(0, 5), y=torch.empty(0, 4))
    assert empty.shape == (0, 4) and torch.equal(y_of(x=torch.ones(1, 1).expand(3, 6)), y_of(x=torch.ones(3, 6)))
    for K in (1, 2):  # a single column has any stride
        wide = torch.randint(-4, 5, (5, 7)).float()
        given = dict(x=wide[:3, :K], A=wide[:, 1 : 1 + K], W=wide[1:, 2 : 2 + K])
        assert torch.equal(y_of(**given), y_of(**{name: t.contiguous() for name, t in given.items()}))


@pytest.mark.parametrize("M", [1000, 4000])
def test_dbias_is_summed_by_blocks(M):
    """One chain over all rows has 8 times PyTorch's error here."""
    p = random_problem(M, 64, 24, 4)
    assert_close(run(p, backend="cpu"), run(p, backend="reference"), truth(p))


_ORDER = ("baseline", "avx2", "avx512", "bf16_dot", "amx")
_PATHS = """
import torch
from fused_lora import _C
from fused_lora.backends import cpu, cpu_norm, cpu_product
from fused_lora.ops.reference import PLAIN
from fused_lora.ops.schema import request_of
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem, run, truth, with_optional

assert _C.cpu_features() == {expect}
for dtype, adapter in ((torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None)):
    for shape in ((1, 40, 24, 1), (101, 330, 400, 33), (50, 513, 769, 8)):
        p = exact_problem(*shape, dtype, adapter)
        for plan in cpu.plans(request_of(p.x, p.weight, p.lora_A, PLAIN)):
            assert_exact(run(p, backend="cpu:" + plan), truth(p))
            q, masked = random_problem(*shape, dtype, adapter), dict(dropout_p=0.25, seed=torch.tensor([5]))
            assert_close(run(q, backend="cpu:" + plan, **masked), run(q, backend="reference", **masked),
                         truth(q, **masked))
        want, p.weight = truth(p), p.weight.t().contiguous().t()
        for plan in cpu.plans(request_of(p.x, p.weight, p.lora_A, PLAIN)):
            assert_exact(run(p, backend="cpu:" + plan), want)
    for N, K, R in ((40, 784, 8), (61, 400, 16), (50, 41, 43)):
        W, A, B = (torch.randint(-2, 3, size).float() for size in ((N, K), (R, K), (N, R)))
        want = (W.double() + 0.5 * B.double() @ A.double()).square().sum(1).clamp(min=1.0).sqrt().float()
        assert torch.equal(cpu_norm.row_norm(W.to(dtype), A, B, 0.5)[0], want)
    optional = ("x_lora", "h_in", "gate", "out_scale", "grad_row_scale", "dh")
    for names in (optional, optional[1:]):
        p = with_optional(exact_problem(101, 413, 100, 8, dtype, adapter), names, exact=True, gates=4)
        for plan in cpu.plans(request_of(p.x, p.weight, p.lora_A, p.variant)):
            assert_exact(run(p, backend="cpu:" + plan, needs=p.needs()), truth(p, needs=p.needs()))
    for shape in ((5, 40, 33, 1), (13, 24, 40, 16), (33, 33, 33, 17)):
        for name in ("x", "lora_A", "lora_B", "dy"):  # the padding's zeros beside an Inf must make no NaN
            p = exact_problem(*shape, dtype, adapter)
            for t in (p.x, p.weight, p.lora_A, p.lora_B, p.dy):
                t.fill_(1.0)
            getattr(p, name)[0, 0] = float("inf")
            for plan in cpu.plans(request_of(p.x, p.weight, p.lora_A, PLAIN)):
                for key, got in run(p, backend="cpu:" + plan).items():
                    assert torch.equal(got.isposinf(), truth(p)[key].isposinf()), (plan, dtype, shape, name, key)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set(isa):
    """The paths that this machine would not take, in a process that leaves out what comes later."""
    has, last = _C.cpu_features(), _ORDER.index("bf16_dot" if isa == "avx512_bf16" else isa)
    expect = {name: has[name] and _ORDER.index(name) <= last for name in _ORDER[1:]}
    environment = os.environ | {"FUSED_LORA_MAX_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", _PATHS.format(expect=expect)], env=environment, check=True, timeout=120)


def test_an_unknown_instruction_set_is_refused():
    environment = os.environ | {"FUSED_LORA_MAX_CPU_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", "from fused_lora import _C"], env=environment, capture_output=True, text=True
    )
    assert "FUSED_LORA_MAX_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx; got sse9" in done.stderr


def test_each_plan_runs_its_own_product(monkeypatch):
    """The plan that is asked for serves forward and backward, in eager mode and through the operators."""
    calls, p = [], random_problem(8, 16, 24, 4)
    for name in ("cpu_forward", "cpu_backward"):
        real = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda real=real, **given: calls.append(given["W"] is not None) or real(**given))
    for plan, inside in (("inside", True), ("around", False)):
        calls.clear()
        x = p.x.clone().requires_grad_()
        lora_linear(x, p.weight, p.lora_A, p.lora_B, 1.0, backend=f"cpu:{plan}").backward(p.dy)
        run(p, backend=f"cpu:{plan}")
        assert calls == [inside] * 4


def test_a_plan_that_is_not_there_is_refused():
    p = random_problem(8, 16, 24, 4, torch.float16)
    for backend, words in (
        ("cpu:inside", "backend 'cpu' supports the plans around for this call; got 'inside'"),
        ("reference:fast", "backend 'reference' supports no plan by name for this call; got 'fast'"),
        ("auto:inside", "backend must be one of auto, .*; got 'auto:inside'$"),
    ):
        with pytest.raises(ValueError, match=words):
            lora_linear(p.x, p.weight, p.lora_A, p.lora_B, 1.0, backend=backend)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(4, 31, 33, 3), (100, 1056, 770, 60)])
def test_dx_is_added_to_another_layer_s(poison, shape, dropout_p):
    """backward_onto in each plan: exact where nothing is dropped, else what backward has, up to a rounding."""
    for plan in ("inside", "around"):
        p, before = exact_problem(*shape), torch.randint(-2, 3, (shape[0], shape[2])).float()
        seed, needs = torch.tensor([5]) if dropout_p else None, Gradients(True, False, True, True, *[False] * 5)
        h = cpu.forward(p.x, p.weight, p.lora_A, p.lora_B, None, p.scaling, dropout_p, seed, PLAIN, plan)[1]
        given, settings = (p.x, p.weight, p.lora_A, p.lora_B, h), (p.scaling, dropout_p, seed, needs)
        want = cpu.backward(p.dy, None, *given, None, None, *settings, PLAIN, plan)
        found = cpu.backward_onto(before.clone(), p.dy, *given, *settings, plan)
        torch.testing.assert_close(found.x, want.x + before, rtol=0, atol=1e-5 * dropout_p)
        assert torch.equal(found.lora_A, want.lora_A) and torch.equal(found.lora_B, want.lora_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (37, 321, 385), (100, 1056, 1160)])
def test_the_product_alone(poison, dtype, M, N, K):
    """y and dx without an update, exactly; of rows in a wider matrix, with W however it lies, into what is given."""
    if not cpu_product.serves(dtype):
        pytest.skip(f"this CPU has no kernel for the product of {dtype} alone")
    p = exact_problem(M, N, K, 1, dtype)
    x, dy = (torch.nn.functional.pad(t, (3, 5), value=float("nan"))[:, 3:-5] for t in (p.x, p.dy))
    y, dx = p.x.double() @ p.weight.double().t(), p.dy.double() @ p.weight.double()
    for weight in strided(p.weight):
        assert torch.equal(cpu_product.product(x, weight, p.bias).double(), y + p.bias.double())
        assert torch.equal(cpu_product.product(x, weight).double(), y)
        given = torch.full((M, K), float("nan"), dtype=dtype)
        assert cpu_product.product(dy, weight.t(), y=given) is given and torch.equal(given.double(), dx)
