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
SERVING = ("cpu", "reference")  # the back ends that have it


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
    """y, h, dx and the gradients of all A and of all B one after the other."""
    found, split = iter(grads), 1 + len(p["lora_A"])
    dx, *factors = [next(found).flatten() if need else None for need in needs]
    joined = lambda ts: torch.cat([t for t in ts if t is not None]) if any(t is not None for t in ts) else None
    return dict(y=out, h=h, dx=dx, dA=joined(factors[: split - 1]), dB=joined(factors[split - 1 :]))


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
    dict(counts=(12, 100), N=70, K=390, ranks=(8, 8), indexed=False),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_every_size_read_no_row_beside_them(dtype):
    """x and dy are read where they lie, in strips of as many rows as there are: within NaN, and the groups' own after
    one another."""
    for rows in range(1, 26):
        p = problem((rows, 0, 26 - rows), 64, 48, (16, 3, 8), dtype=dtype, indexed=False, exact=True)
        want = truth(p)
        for name in ("x", "dy"):
            p[name] = F.pad(p[name], (32, 32, 24, 24), value=torch.nan)[24:-24, 32:-32]
        assert_exact(run(p, backend="cpu"), want)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("indexed", [False, True])
def test_many_rows_and_columns_of_a_group(indexed, adapter):
    """More than one task sums up, of integers that every dtype holds; dropout of a half scales by 2."""
    p = problem((300, 3), 40, 1060, (5, 17), dtype=torch.bfloat16, adapter=adapter, indexed=indexed, exact=True)
    for ps, seed in (((), None), ((0.5, 0.0), SEED)):
        got, want = (run(p, backend=backend, ps=ps, seed=seed) for backend in SERVING)
        for name, value in got.items():
            assert torch.equal(value, want[name]), name


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


def test_results_repeat_bit_for_bit_on_any_number_of_threads():
    """A group of several blocks, whose gradients a split over threads would add up in another order; bf16 and fp32."""
    for dtype in (torch.float32, torch.bfloat16):
        p, results, before = problem((300, 30), 400, 390, (8, 4), dtype=dtype), [], torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(run(p, backend="cpu", ps=[0.5, 0.1], seed=SEED))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("backend", SERVING)
def test_another_order_of_the_rows_gives_the_same(backend):
    """The same rows in the same groups, at other places of x: the kernel reads runs, broken runs and single rows."""
    p = problem((60, 50), 24, 40, (8, 4), indexed=False)
    want = run(p, backend=backend)
    runs = torch.cat([torch.arange(60, 110), torch.arange(0, 60)])
    swapped = torch.arange(110) ^ 1
    for order in (torch.arange(110), runs, swapped, torch.randperm(110)):
        moved = {name: torch.empty_like(p[name]).index_copy_(0, order, p[name]) for name in ("x", "y", "dy")}
        got = run(p | moved | dict(rows=order), backend=backend)
        got["y"], got["dx"] = got["y"][order], got["dx"].view(110, 40)[order].flatten()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
