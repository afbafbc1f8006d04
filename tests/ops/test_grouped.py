"""grouped_lora_update(): equal to a loop over its groups with lora_update, exact, pruned, compiled, strict."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fused_lora import grouped_lora_update, lora_update
from fused_lora.ops.dropout import dropout_mask
from fused_lora.testing import assert_close, assert_exact

FORWARD, BACKWARD = (torch.ops.fused_lora.grouped_update.default, torch.ops.fused_lora.grouped_update_backward.default)
SEED = torch.tensor([5], dtype=torch.int64)
SERVING = ("reference",)  # the back ends that have it


def problem(counts, N, K, ranks, *, dtype=torch.float32, adapter=None, indexed=True, left_out=3, exact=False, seed=0):
    """The tensors of a call by name, and dy: rows in random order where indexed, `left_out` of them in no group."""
    g = torch.Generator().manual_seed(seed)
    M = sum(counts) + (left_out if indexed else 0)

    def fill(*shape, scale=1.0, dtype=dtype):
        if exact:  # sparse integers, whose sums every dtype holds
            t = torch.randint(-1, 2, shape, generator=g).float()
            return (t * (torch.rand(shape, generator=g) < min(1.0, 4 / shape[-1]))).to(dtype)
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    adapter = adapter or dtype
    return dict(
        y=fill(M, N),
        x=fill(M, K),
        lora_A=[fill(R, K, scale=K**-0.5, dtype=adapter) for R in ranks],
        lora_B=[fill(N, R, scale=R**-0.5, dtype=adapter) for R in ranks],
        scaling=[2.0 ** (g % 3 - 1) for g in range(len(ranks))],
        offsets=torch.tensor([0, *itertools.accumulate(counts)]),
        rows=torch.randperm(M, generator=g)[: sum(counts)] if indexed else None,
        dy=fill(M, N),
    )


def stacked(p, shared_A=False, shared_B=False):
    """The same with one tensor for all factors A, and for all B; shared by the groups where it says so."""
    A, B = torch.stack(p["lora_A"]), torch.stack(p["lora_B"])
    return p | dict(lora_A=[A[:1] if shared_A else A], lora_B=[B[:1] if shared_B else B])


def as_op(p, ps=(), seed=None):
    """The arguments of the operator."""
    scaling = torch.tensor(p["scaling"], dtype=torch.promote_types(p["x"].dtype, torch.float32))
    return p["y"], p["x"], p["lora_A"], p["lora_B"], scaling, p["offsets"], p["rows"], list(ps), seed


def named(out, h, grads, needs, p):
    names = ["dx", *(f"dA{g}" for g in range(len(p["lora_A"]))), *(f"dB{g}" for g in range(len(p["lora_B"])))]
    found = iter(grads)
    return {"y": out, "h": h} | {name: next(found) if need else None for name, need in zip(names, needs)}


def run(p, *, backend, ps=(), seed=None, needs=None):
    """y, h and the gradients of `needs` through the operators."""
    needs = needs or [True] * (1 + len(p["lora_A"]) + len(p["lora_B"]))
    y, x, A, B, *segments = as_op(p, ps, seed)
    out, h = FORWARD(y, x, A, B, *segments, backend)
    return named(out, h, BACKWARD(p["dy"], x, A, B, h, *segments, needs, backend), needs, p)


def truth(p, ps=(), seed=None):
    """What `run` computes, in fp64, by autograd of a loop over single rows."""
    p = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in p.items()}
    x = p["x"].requires_grad_()
    As, Bs = ([t.double().requires_grad_() for t in p[name]] for name in ("lora_A", "lora_B"))
    pick = lambda ts, g: ts[g] if ts[0].dim() == 2 else ts[0][min(g, len(ts[0]) - 1)]
    h = torch.zeros(int(p["offsets"][-1]), max(A.shape[-2] for A in As), dtype=torch.float64)
    updates = torch.zeros_like(p["y"])
    for g, (start, end) in enumerate(itertools.pairwise(p["offsets"].tolist())):
        for m in range(start, end):
            row = m if p["rows"] is None else int(p["rows"][m])
            masked = x[row] if seed is None else x[row] * dropout_mask(seed, row + 1, x.shape[1], ps[g], x.dtype)[row]
            low = p["scaling"][g] * masked @ pick(As, g).t()
            h[m, : len(low)] = low.detach()
            updates = updates.index_add(0, torch.tensor([row]), (low @ pick(Bs, g).t())[None])
    ts = (x, *As, *Bs)
    if not h.numel():
        return named(p["y"], h, [torch.zeros_like(t) for t in ts], [True] * len(ts), p)
    grads = torch.autograd.grad(updates, ts, p["dy"], materialize_grads=True)
    return named((p["y"] + updates).detach(), h, grads, [True] * len(ts), p)


# Rows around the kernels' blocks, groups that are empty, of one row, and of several blocks; odd sizes; mixed ranks.
CASES = [
    dict(counts=(0,), N=6, K=10, ranks=(3,), left_out=0),
    dict(counts=(1, 0, 17), N=24, K=32, ranks=(8, 4, 1)),
    dict(counts=(0, 13, 100, 0, 2), N=33, K=47, ranks=(16, 3, 12, 5, 40)),
    dict(counts=(12, 12), N=70, K=390, ranks=(8, 8), indexed=False),
    dict(counts=(130,), N=16, K=24, ranks=(4,), left_out=0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case["counts"])))
@pytest.mark.parametrize("backend", SERVING)
def test_exact_and_near_enough(poison, backend, case):
    for dtype, adapter in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)):
        p = problem(**case, dtype=dtype, adapter=adapter, exact=True)
        assert_exact(run(p, backend=backend), truth(p))
        p, ps = problem(**case, dtype=dtype, adapter=adapter), [0.25, 0.0, 0.5, 0.1, 0.25][: len(case["counts"])]
        for masked in ({}, dict(ps=ps, seed=SEED)):
            assert_close(run(p, backend=backend, **masked), run(p, backend="reference", **masked), truth(p, **masked))


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("shared_A, shared_B", [(False, False), (True, False), (False, True), (True, True)])
def test_stacked_and_shared_factors(backend, shared_A, shared_B):
    for exact, check in ((True, assert_exact), (False, None)):
        p = problem((5, 0, 30, 14), 20, 26, (6,) * 4, exact=exact)
        p = stacked(p, shared_A, shared_B)
        if check:
            check(run(p, backend=backend), truth(p))
        else:
            assert_close(run(p, backend=backend), run(p, backend="reference"), truth(p))


@pytest.mark.parametrize("backend", SERVING)
def test_is_lora_update_of_one_group(backend):
    """With one group of all rows: the same result, gradients and dropout mask."""
    p = problem((40,), 24, 64, (8,), indexed=False)

    def grads(op):
        ts = [t.clone().requires_grad_() for t in (p["y"], p["x"], p["lora_A"][0], p["lora_B"][0])]
        torch.manual_seed(3)
        out = op(*ts)
        out.backward(p["dy"])
        return [out.detach()] + [t.grad for t in ts]

    one = lambda y, x, A, B: lora_update(y, x, A, B, 0.5, dropout_p=0.5)
    group = lambda y, x, A, B: grouped_lora_update(y, x, [A], [B], 0.5, p["offsets"], dropout_p=0.5, backend=backend)
    torch.testing.assert_close(grads(group), grads(one))


def test_leading_dimensions_strides_and_kinds_of_scaling():
    p = problem((4, 2), 6, 10, (3, 2), left_out=0)
    wide = torch.randn(2, 3, 14, requires_grad=True)
    y = torch.randn(2, 3, 6)
    x = wide[..., 1:11]
    want = run(p | dict(x=x.reshape(6, 10).detach(), y=y.view(6, 6)), backend="reference")["y"]
    for scaling in (p["scaling"], tuple(p["scaling"]), torch.tensor(p["scaling"])):
        given = p["lora_A"], p["lora_B"], scaling, p["offsets"].int()
        got = grouped_lora_update(y, x, *given, rows=p["rows"].int())
        torch.testing.assert_close(got.view(6, 6), want)
    (dx,) = torch.autograd.grad(got, wide, torch.ones_like(got))
    assert dx.shape == wide.shape and (dx[..., 0] == 0).all()
    got += 1.0  # models add the residual in place
    flat = grouped_lora_update(y, x, *given[:2], 0.5, given[3], rows=p["rows"], training=False, dropout_p=0.9)
    same = grouped_lora_update(y, x, *given[:2], [0.5, 0.5], given[3], rows=p["rows"])
    assert torch.equal(flat, same)


@pytest.mark.parametrize("backend", SERVING)
def test_autograd_computes_and_saves_what_is_needed_alone(backend):
    """Every subset of y, x, A and B of each of two groups: x is kept for some dA alone, h for some dB, y never."""
    p = problem((5, 9), 24, 32, (8, 4))
    for needs in itertools.product((True, False), repeat=6):
        y, x, A0, A1, B0, B1 = ts = [
            t.clone().requires_grad_(need) for t, need in zip((p["y"], p["x"], *p["lora_A"], *p["lora_B"]), needs)
        ]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            out = grouped_lora_update(y, x, [A0, A1], [B0, B1], 0.5, p["offsets"], rows=p["rows"], backend=backend)
        assert (x.data_ptr() in kept, y.data_ptr() in kept) == (needs[2] or needs[3], False)
        constants, factors = 3, 4  # scaling, offsets, rows
        expected = constants + factors + (needs[2] or needs[3]) + (needs[4] or needs[5])
        assert len(kept) == (expected if any(needs) else 0)
        if any(needs):
            out.backward(p["dy"])
            assert [t.grad is not None for t in ts] == list(needs)


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_dtype_of_y(x_dtype, y_dtype):
    p = problem((8, 8), 24, 32, (8, 4), dtype=x_dtype, adapter=torch.float32)
    y = p["y"].to(y_dtype).requires_grad_()
    out = grouped_lora_update(y, p["x"], p["lora_A"], p["lora_B"], 1.0, p["offsets"], rows=p["rows"])
    out.backward(torch.ones_like(out))
    assert out.dtype == y.grad.dtype == y_dtype


def test_autocast_behaves_as_linear_does():
    p = problem((8, 8), 24, 32, (8, 4))
    x, A = p["x"].requires_grad_(), [t.requires_grad_() for t in p["lora_A"]]
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_lora_update(p["y"].bfloat16(), x, A, p["lora_B"], 1.0, p["offsets"], rows=p["rows"])
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert (x.grad.dtype, A[0].grad.dtype) == (torch.float32, torch.float32)


def leaves(p):
    return [t.detach().clone().requires_grad_() for t in (p["y"], p["x"], *p["lora_A"], *p["lora_B"])]


def loop(y, x, *factors, p):
    """The op by a loop of plain operators."""
    n = len(factors) // 2
    for g, (start, end) in enumerate(itertools.pairwise(p["offsets"].tolist())):
        at = p["rows"][start:end]
        y = y.index_add(0, at, p["scaling"][g] * F.linear(F.linear(x[at], factors[g]), factors[n + g]))
    return y


def op(y, x, *factors, p):
    n = len(factors) // 2
    return grouped_lora_update(y, x, factors[:n], factors[n:], p["scaling"], p["offsets"], rows=p["rows"])


def test_second_derivatives():
    p = problem((3, 0, 4), 10, 12, (3, 2, 1), dtype=torch.float64)

    def second(f):
        ts = leaves(p)
        used = [t * (1.0 + ts[1].mean()) for t in ts]
        first = torch.autograd.grad(f(*used, p=p).pow(3).sum(), ts, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), ts)]

    torch.testing.assert_close(second(op), second(loop))
    ts = [t.requires_grad_(i not in (2, 3, 4)) for i, t in enumerate(leaves(p))]
    with pytest.raises(RuntimeError, match="needs x, which is kept only where lora_A trains"):
        torch.autograd.grad(op(*ts, p=p).sum(), ts[5], create_graph=True)


def test_functional_transforms_see_plain_operators():
    p = problem((3, 0, 4), 10, 12, (3, 2, 1), dtype=torch.float64)
    ts = leaves(p)
    grads = [torch.func.grad(lambda *a: f(*a, p=p).pow(2).sum(), tuple(range(8)))(*ts) for f in (op, loop)]
    torch.testing.assert_close(*grads)
    vectorized = [
        torch.autograd.functional.jacobian(lambda x, A: op(ts[0], x, A, *ts[3:], p=p), (ts[1], ts[2]), vectorize=fast)
        for fast in (True, False)
    ]
    torch.testing.assert_close(*vectorized)


@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(dropout):
    p = problem((2, 0, 3), 10, 12, (3, 2, 1), dtype=torch.bfloat16)
    y, x, A, B, *segments = as_op(p, *(([0.5] * 3, SEED) if dropout else ()))
    torch.library.opcheck(FORWARD, (y, x, A, B, *segments, "auto"))
    h = torch.randn(5, 3).bfloat16()
    for needs in ([True] * 7, [False, True, False, False, False, False, True]):
        torch.library.opcheck(BACKWARD, (p["dy"], x, A, B, h, *segments, needs, "auto"))


def test_compiles_into_one_graph():
    p = problem((6, 10, 2), 16, 32, (4, 8, 2), left_out=4)
    counter = CompileCounterWithBackend("aot_eager")

    def step(*ts, rows, offsets):
        return F.gelu(op(*ts, p=p | dict(rows=rows, offsets=offsets))).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for offsets in (p["offsets"], torch.tensor([0, 1, 2, 18])):
        results = []
        for f in (compiled, step):
            ts = leaves(p)
            loss = f(*ts, rows=p["rows"], offsets=offsets)
            results.append([loss.detach(), *torch.autograd.grad(loss, ts)])
        torch.testing.assert_close(*results)
    with torch.no_grad():
        compiled(*ts, rows=p["rows"], offsets=offsets)
    assert counter.frame_count <= 2


GOOD = problem((2, 3), 6, 10, (3, 2))
BAD = [
    (dict(offsets=torch.tensor([0, 3, 2])), r"offsets must ascend from 0 to 5 to cover rows; got \[0, 3, 2\]"),
    (dict(offsets=torch.tensor([0, 2, 4])), r"offsets must ascend from 0 to 5 to cover rows; got \[0, 2, 4\]"),
    (dict(rows=None), r"offsets must ascend from 0 to 8 to cover the rows of x; got \[0, 2, 5\]"),
    (dict(rows=torch.tensor([0, 1, 2, 3, 8])), r"rows must be in \[0, 8\), the rows of x; got 8"),
    (dict(rows=torch.tensor([0, 1, -2, 3, 4])), r"rows must be in \[0, 8\), the rows of x; got -2"),
    (dict(rows=torch.tensor([0, 1, 1, 3, 4])), r"rows must name each row once at most; got 5 with repetitions"),
    (dict(rows=torch.zeros(5)), r"rows must be int64 or int32 of shape \[M'\]; got torch.float32 \[5\]"),
    (dict(offsets=torch.tensor([0])), r"offsets must have shape \[G \+ 1\] with G >= 1; got \[1\]"),
    (dict(offsets=[0, 2, 5]), r"offsets must be a torch.Tensor; got list"),
    (
        dict(lora_A=GOOD["lora_A"][:1]),
        r"lora_A must be 2 tensors \[R, K\] to match offsets \[3\], .*; got \[\[3, 10\]\]",
    ),
    (dict(lora_B=torch.zeros(3, 6, 2)), r"lora_B must be 2 tensors \[N, R\] .* or \[1, N, R\]; got \[3, 6, 2\]"),
    (
        dict(lora_B=[torch.zeros(6, 3), torch.zeros(6, 3)]),
        r"lora_B must have lora_A's rank .* ranks 3 and 2 of group 1",
    ),
    (dict(lora_A=[torch.zeros(3, 10), torch.zeros(2, 9)]), r"lora_A must have the same K in all groups; got 10 and"),
    (dict(lora_B=[torch.zeros(6, 3), torch.zeros(5, 2)]), r"lora_B must have the same N in all groups; got 6 and"),
    (dict(lora_A=3), r"lora_A must be a tensor or a sequence of tensors; got int"),
    (dict(lora_A=[3, 4]), r"lora_A must hold tensors; got a int"),
    (
        dict(lora_B=[torch.zeros(6, 3), torch.zeros(6, 2).half()]),
        r"lora_B must have x's dtype torch.float32 or float32",
    ),
    (dict(x=torch.zeros(8, 9)), r"x must have shape \[..., 10\] to match lora_A; got \[8, 9\]"),
    (dict(y=torch.zeros(8, 7)), r"y must have shape \[8, 6\] to match x \[8, 10\] and lora_B; got \[8, 7\]"),
    (dict(scaling=[1.0]), r"scaling must have 2 numbers to match offsets \[3\]; got 1"),
    (dict(scaling=torch.ones(3)), r"scaling must have shape \[2\] to match offsets \[3\]; got \[3\]"),
    (dict(scaling=torch.ones(2, requires_grad=True)), r"scaling must not require gradients"),
    (dict(scaling="big"), r"scaling must be a number, 2 numbers or a tensor \[2\]; got 'big'"),
    (dict(dropout_p=[0.1]), r"dropout_p must be a number or 2 numbers to match offsets \[3\]; got 1"),
    (dict(dropout_p=[0.1, 1.0]), r"dropout_p must be in \[0, 1\); got 1.0"),
    (dict(backend="gpu"), r"backend must be one of auto, .*; got 'gpu'"),
    (dict(offsets=GOOD["offsets"].to("meta")), r"offsets must be on x's device cpu; got meta"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_named(change, message):
    given = {name: value for name, value in GOOD.items() if name != "dy"} | change
    with pytest.raises(ValueError, match=message):
        grouped_lora_update(**given)


def test_a_back_end_without_it_says_so(on_triton):
    given = {k: v.to(on_triton.device) if isinstance(v, torch.Tensor) else v for k, v in GOOD.items() if k != "dy"}
    given |= {name: [t.to(on_triton.device) for t in given[name]] for name in ("lora_A", "lora_B")}
    message = "backend 'triton' supports the update together with its base product only; got grouped_lora_update"
    with pytest.raises(ValueError, match=message):
        grouped_lora_update(**given, backend="triton")
