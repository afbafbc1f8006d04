"""lora_update(), the low-rank half of the op over a given y: exact, near enough, pruned, compiled, and as strict as
lora_linear()."""

import inspect
import itertools

import pytest
import torch
from bad_arguments import with_change
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fused_lora import lora_linear, lora_update
from fused_lora.ops.dropout import dropout_mask
from fused_lora.testing import assert_close, assert_exact, exact_problem, random_problem

UPDATE, BACKWARD = torch.ops.fused_lora.update.default, torch.ops.fused_lora.update_backward.default
SEED = torch.tensor([5], dtype=torch.int64)
SERVING = ("cpu", "reference")  # the back ends that have the half alone


def run(p, y, *, backend, dropout_p=0.0, seed=None, needs=(True,) * 3):
    """y, h and the gradients of `needs` through the operators; y [M, N] is the base product's result."""
    out, h = UPDATE(y, p.x, p.lora_A, p.lora_B, p.scaling, dropout_p, seed, backend)
    given = (p.dy, p.x, p.lora_A, p.lora_B, h, p.scaling, dropout_p, seed)
    grads = iter(BACKWARD(*given, list(needs), backend))
    named = {name: next(grads) if need else None for name, need in zip(("dx", "dA", "dB"), needs)}
    return {"y": out, "h": h, **named}


def truth(p, y, dropout_p=0.0, seed=None):
    """What `run` computes, in fp64, by PyTorch's autograd of the formula."""
    p, y = p.to(torch.float64), y.double()
    x, A, B = (t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
    mask = 1.0 if seed is None else dropout_mask(seed, *x.shape, dropout_p, torch.float64)
    h = p.scaling * F.linear(x * mask, A)
    out = y + F.linear(h, B)
    dx, dA, dB = torch.autograd.grad(out, (x, A, B), p.dy)
    return {"y": out.detach(), "h": h.detach(), "dx": dx, "dA": dA, "dB": dB}


def leaves(p, y):
    return [t.detach().clone().requires_grad_() for t in (y, p.x, p.lora_A, p.lora_B)]


# Rows around the kernels' blocks, odd N and K, ranks that fill no vector.
SHAPES = [(0, 6, 10, 3), (1, 24, 32, 8), (17, 33, 47, 12), (129, 70, 130, 16), (40, 1, 1, 1), (33, 200, 500, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", SERVING)
def test_exact_and_near_enough(poison, backend, shape):
    for dtype, adapter in itertools.product((torch.float32, torch.bfloat16, torch.float16), (None, torch.float32)):
        p = exact_problem(*shape, dtype, adapter)
        y = torch.randint(-4, 5, p.dy.shape).to(dtype)
        assert_exact(run(p, y, backend=backend), truth(p, y))
        if shape[3] == 1:  # PyTorch's product is then a matrix by a vector, with errors of its own kind
            continue
        p = random_problem(*shape, dtype, adapter)
        y = torch.randn(p.dy.shape).to(dtype)
        for dropout_p, seed in ((0.0, None), (0.25, SEED)):
            masked = dict(dropout_p=dropout_p, seed=seed)
            assert_close(
                run(p, y, backend=backend, **masked), run(p, y, backend="reference", **masked), truth(p, y, **masked)
            )


@pytest.mark.parametrize("backend", SERVING)
def test_autograd_computes_and_saves_what_is_needed_alone(backend):
    """Every subset: x is kept for dA alone, h for dB alone, y never; y's gradient is dy; y stays as it is."""
    p = random_problem(20, 24, 32, 8)
    y, seed_numbers = torch.randn(20, 24), 1
    for needs in itertools.product((True, False), repeat=4):
        ts = [t.requires_grad_(need) for t, need in zip(leaves(p, y), needs)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            out = lora_update(*ts, p.scaling, backend=backend, dropout_p=0.5)
        saved = {name for name, t in zip("yx", ts) if t.data_ptr() in kept}
        assert saved == ({"x"} if needs[2] else set())
        extra = set(kept) - {t.data_ptr() for t in ts}
        assert len(extra) == (seed_numbers + needs[3] if any(needs) else 0)
        assert torch.equal(ts[0], y) and out.data_ptr() != ts[0].data_ptr()
        if any(needs):
            out.backward(p.dy)
            assert [t.grad is not None for t in ts] == list(needs)
        if needs[0]:
            assert torch.equal(ts[0].grad, p.dy)


@pytest.mark.parametrize("lead", [(), (5,), (0,), (2, 0), (2, 3), (2, 1, 3)])
def test_leading_dimensions_and_strides(lead):
    p = random_problem(1, 6, 10, 3)
    wide_x, wide_y = torch.randn(*lead, 14), torch.randn(*lead, 9)
    ts = [wide_y.requires_grad_(), wide_x.requires_grad_(), p.lora_A.requires_grad_(), p.lora_B.requires_grad_()]
    view = lambda f: f(ts[0][..., 2:8], ts[1][..., 1:11], *ts[2:])
    got = view(lambda *ts: lora_update(*ts, p.scaling))
    want = view(lambda y, x, A, B: y + p.scaling * F.linear(F.linear(x, A), B))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), ts), torch.autograd.grad(want.sum(), ts))
    got += 1.0  # models add the residual in place


def test_is_the_low_rank_half_of_lora_linear():
    """Over F.linear's y, with the same seed: y, every gradient and the dropout mask are lora_linear's."""
    p = random_problem(40, 24, 64, 8)

    def grads(f):
        x, A, B, bias = (t.detach().clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B, p.bias))
        torch.manual_seed(3)
        y = f(x, A, B, bias)
        y.backward(p.dy)
        return [y.detach(), x.grad, A.grad, B.grad, bias.grad]

    whole = grads(lambda x, A, B, bias: lora_linear(x, p.weight, A, B, p.scaling, bias=bias, dropout_p=0.5))
    half = grads(lambda x, A, B, bias: lora_update(F.linear(x, p.weight, bias), x, A, B, p.scaling, dropout_p=0.5))
    torch.testing.assert_close(half, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_dtype_of_y(x_dtype, y_dtype):
    p = random_problem(20, 24, 32, 8, x_dtype, torch.float32)
    ts = leaves(p, torch.randn(20, 24).to(y_dtype))
    out = lora_update(*ts, p.scaling)
    out.backward(torch.ones_like(out))
    assert out.dtype == y_dtype and [t.grad.dtype for t in ts] == [t.dtype for t in ts]
    want = ts[0] + p.scaling * F.linear(F.linear(ts[1].float(), ts[2]), ts[3])
    eps = max(torch.finfo(x_dtype).eps, torch.finfo(y_dtype).eps)
    assert (out - want).abs().max() <= 3 * eps * want.abs().max()


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_autocast_behaves_as_linear_does(adapter):
    """x is cast, fp32 adapters stay, y, which the base product has made under autocast, too, decides the result."""
    p = random_problem(16, 24, 32, 8)
    x, A, B = p.x.requires_grad_(), p.lora_A.to(adapter).requires_grad_(), p.lora_B.to(adapter).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, p.weight)
        out = lora_update(y, x, A, B, 1.0)
    assert out.dtype == torch.bfloat16
    same = lora_update(y.detach(), x.detach().bfloat16(), A.detach(), B.detach(), 1.0)
    assert torch.equal(out, same)
    out.sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.float32, adapter, adapter)


@pytest.mark.parametrize("backend", SERVING)
def test_a_backward_under_autocast_computes_in_the_forwards_dtype(backend):
    p = random_problem(20, 24, 32, 8)
    ts = leaves(p, torch.randn(20, 24))
    out = lora_update(*ts, p.scaling, backend=backend)
    want = torch.autograd.grad(out, ts, p.dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out, ts, p.dy)
    assert all(map(torch.equal, got, want))


def test_no_call_reads_a_signature(monkeypatch):
    """Function.apply binds its arguments by inspect.signature, for more time than the rest of a small call."""
    p, read = random_problem(16, 24, 32, 8), []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *args, **kwargs: read.append(args) or signature(*args, **kwargs))
    y, x, A, B = leaves(p, torch.randn(16, 24))
    lora_update(y, x, A, B, 0.5).sum().backward()
    lora_linear(x, p.weight, A, B, 0.5).sum().backward()
    lora_linear(x, p.weight.requires_grad_(), A, B, 0.5).sum().backward()
    assert not read


def test_scaling_as_a_tensor_trains():
    p = random_problem(16, 24, 32, 8)
    s, y = torch.tensor(1.5, requires_grad=True), torch.randn(16, 24)
    out = lora_update(y, p.x, p.lora_A, p.lora_B, s)
    torch.testing.assert_close(out, lora_update(y, p.x, p.lora_A, p.lora_B, 1.5))
    (ds,) = torch.autograd.grad(out, s, p.dy)
    torch.testing.assert_close(ds, (p.dy * F.linear(F.linear(p.x, p.lora_A), p.lora_B)).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, dropout):
    p = random_problem(6, 10, 12, 3, dtype)
    p.x, masked = p.x.t().contiguous().t(), (0.5, SEED) if dropout else (0.0, None)
    torch.library.opcheck(UPDATE, (p.dy, p.x, p.lora_A, p.lora_B, 1.5, *masked, "auto"))
    for needs in ([True, True, True], [False, True, False], [False, False, False]):
        given = (p.dy, p.x, p.lora_A, p.lora_B, torch.randn(6, 3).to(dtype), 1.5, *masked)
        torch.library.opcheck(BACKWARD, (*given, needs, "auto"))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(compiler):
    p = random_problem(24, 16, 32, 4, bias=False)
    counter = CompileCounterWithBackend(compiler)

    def step(x, A, B):
        return F.gelu(lora_update(F.linear(x, p.weight), x, A, B, 1.5)).square().mean()

    def grads(f, rows):
        ts = [t.clone().requires_grad_() for t in (p.x[:rows], p.lora_A, p.lora_B)]
        loss = f(*ts)
        loss.backward()
        return [loss.detach()] + [t.grad for t in ts]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (24, 16, 8, 12):
        torch.testing.assert_close(grads(compiled, rows), grads(step, rows), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_functional_transforms_trace_and_subclasses_see_plain_operators():
    p = random_problem(8, 24, 32, 4)
    y = torch.randn(8, 24)
    want = lambda y, x, A, B: y + p.scaling * F.linear(F.linear(x, A), B)
    got = lambda y, x, A, B: lora_update(y, x, A, B, p.scaling)
    ts = (y, p.x, p.lora_A, p.lora_B)
    torch.testing.assert_close(torch.vmap(got, (0, 0, None, None))(*ts), want(*ts))
    torch.testing.assert_close(
        *(torch.func.grad(lambda *a: f(*a).pow(2).sum(), (0, 1, 2, 3))(*ts) for f in (got, want)), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(torch.jit.trace(got, ts, check_trace=False)(*ts), want(*ts))
    jagged = torch.nested.nested_tensor([p.x[:3], p.x[3:]], layout=torch.jagged)
    base = F.linear(jagged, p.weight)
    torch.testing.assert_close(got(base, jagged, *ts[2:]).values(), want(F.linear(p.x, p.weight), *ts[1:]))
    with pytest.raises(ValueError, match="backend must be 'auto' or 'reference' under .* a tensor subclass"):
        lora_update(base, jagged, *ts[2:], 1.0, backend="cpu")
    vectorized = [
        torch.autograd.functional.jacobian(lambda x, A: got(y, x, A, p.lora_B), ts[1:3], vectorize=fast)
        for fast in (True, False)
    ]
    torch.testing.assert_close(*vectorized)


def test_second_derivatives():
    p = random_problem(6, 10, 12, 3).to(torch.float64)

    def second(f):
        y, x, A, B = ts = leaves(p, torch.ones(6, 10, dtype=torch.float64))
        first = torch.autograd.grad(f(y * 2, x * 2, A * x.mean(), B).pow(3).sum(), ts, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), ts)]

    want = second(lambda y, x, A, B: y + 1.5 * F.linear(F.linear(x, A), B))
    torch.testing.assert_close(second(lambda *ts: lora_update(*ts, 1.5)), want)
    ts = leaves(p, torch.ones(6, 10, dtype=torch.float64))
    ts[2].requires_grad_(False)
    with pytest.raises(RuntimeError, match="needs x, which is kept only where lora_A trains"):
        torch.autograd.grad(lora_update(*ts, 1.5).sum(), ts[3], create_graph=True)


GOOD = dict(y=(4, 24), x=(4, 32), lora_A=(8, 32), lora_B=(24, 8))
BAD = [
    (dict(x=(4, 31)), r"x must have shape \[\.\.\., 32\] to match lora_A \[8, 32\]; got \[4, 31\]"),
    (dict(lora_A=(0, 32), lora_B=(24, 0)), r"lora_A must have shape \[R, K\] with R, K >= 1; got \[0, 32\]"),
    (dict(lora_B=(24, 9)), r"lora_B must have shape \[N, 8\] .* got \[24, 9\]"),
    (dict(y=(4, 23)), r"y must have shape \[4, 24\] to match x \[4, 32\] and lora_B \[24, 8\]; got \[4, 23\]"),
    (dict(y=(3, 24)), r"y must have shape \[4, 24\]"),
    (dict(y=(24,)), r"y must have shape \[4, 24\]"),
    (dict(dtype_y=torch.int32), r"y must have a floating dtype; got torch.int32"),
    (dict(dtype_x=torch.int64), r"x must be bfloat16, float16, float32 or float64; got torch.int64"),
    (dict(dtype_lora_A=torch.float16), r"lora_A must have x's dtype torch.float32 or float32; got torch.float16"),
    (dict(device_y="meta"), r"y must be on x's device cpu; got meta"),
    (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\); got 1.0"),
    (dict(backend="gpu"), r"backend must be one of auto, cuda, triton, cpu, reference; got 'gpu'"),
    (dict(backend="cpu:inside"), r"backend 'cpu' supports the plans around for this call; got 'inside'"),
    (dict(scaling=torch.ones(2)), r"scaling must be a number or a 0-d tensor; got a tensor of shape \[2\]"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_named(change, message):
    t, other = with_change(GOOD, change)
    with pytest.raises(ValueError, match=message):
        lora_update(*t.values(), other.pop("scaling", 1.0), **other)


@pytest.mark.parametrize("op", ["linear", "update"])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_a_tensor_scaling_over_half_precision(op, adapter):
    """The scaling moves into A in fp32; B must have A's dtype in the kernels, or they read past it."""
    p = random_problem(20, 24, 32, 8, torch.bfloat16, adapter)
    outs = {}
    for scaling in (p.scaling, torch.tensor(p.scaling)):
        x, A, B = (t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
        y = lora_linear(x, p.weight, A, B, scaling) if op == "linear" else lora_update(p.dy, x, A, B, scaling)
        y.backward(p.dy)
        outs[type(scaling)] = dict(y=y.detach(), dx=x.grad, dA=A.grad, dB=B.grad)
    for name, t in outs[torch.Tensor].items():
        want = outs[float][name]
        assert t.dtype == want.dtype
        torch.testing.assert_close(t, want, rtol=0.02, atol=0.02 * want.abs().max().item())
